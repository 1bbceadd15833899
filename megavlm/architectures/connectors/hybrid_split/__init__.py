"""DeepSeek-VL-7B's connector: a linear layer for each of two towers, side by side, and one behind both."""

from megavlm.architectures.connectors.hybrid_split import cost
from megavlm.architectures.connectors.hybrid_split.config import HybridSplitConfig, products, rules
from megavlm.config.architecture import CONNECTORS, Architecture

ARCHITECTURE = Architecture(
    name="hybrid_split",
    config=HybridSplitConfig,
    build="megavlm.architectures.connectors.hybrid_split.build:build",
    rules=rules,
    products=products,
    cost=cost,
)


def register() -> None:
    """Register the name that a recipe may call it by."""
    CONNECTORS.register("hybrid_split", ARCHITECTURE)
