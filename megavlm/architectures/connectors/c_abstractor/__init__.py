"""Honeybee's connector: RegNet blocks around a pooling."""

from megavlm.architectures.connectors.c_abstractor import cost
from megavlm.architectures.connectors.c_abstractor.config import CAbstractorConfig, rules
from megavlm.config.architecture import CONNECTORS, Architecture

C_ABSTRACTOR = Architecture(
    name="c_abstractor",
    config=CAbstractorConfig,
    build="megavlm.architectures.connectors.c_abstractor.build:build",
    rules=rules,
    # products: none, as the gates' have a row for each picture of a micro-batch, whose number differs: FP8 is refused.
    cost=cost,
)


def register() -> None:
    """Register the names that a recipe may call it by."""
    CONNECTORS.register("c_abstractor", C_ABSTRACTOR, output_grid=12, hidden_size=1024, num_blocks=3)
