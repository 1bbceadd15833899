"""MobileVLM's connectors, which shrink the map of patches by convolutions."""

from megavlm.architectures.connectors.ldp import cost
from megavlm.architectures.connectors.ldp.config import LDPConfig, rules
from megavlm.config.architecture import CONNECTORS, Architecture

LDP = Architecture(
    name="ldp",
    config=LDPConfig,
    build="megavlm.architectures.connectors.ldp.build:build",
    rules=rules,
    # products: none, as the gates' have a row for each picture of a micro-batch, whose number differs: FP8 is refused.
    cost=cost,
)


def register() -> None:
    """Register the names that a recipe may call it by."""
    CONNECTORS.register("ldpnet", LDP, version=1)  # as MobileVLM's mm_projector_type has them
    CONNECTORS.register("ldpnetv2", LDP, version=2, output_grid=12)
