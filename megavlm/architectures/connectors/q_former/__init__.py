"""BLIP-2's Q-Former: learned queries that talk to each other and look at the patches, layer by layer."""

from megavlm.architectures.connectors.q_former import cost
from megavlm.architectures.connectors.q_former.config import QFormerConfig, products, rules
from megavlm.config.architecture import CONNECTORS, Architecture

Q_FORMER = Architecture(
    name="q_former",
    config=QFormerConfig,
    build="megavlm.architectures.connectors.q_former.build:build",
    rules=rules,
    products=products,
    cost=cost,
)


def register() -> None:
    """Register the name that a recipe may call it by."""
    CONNECTORS.register("q_former", Q_FORMER)  # BLIP-2's sizes are the keys' own defaults
