"""A linear layer for each of two towers, side by side (Vary); and one behind both (DeepSeek-VL-7B)."""

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
    """Register the names that a recipe may call it by."""
    CONNECTORS.register("hybrid_split", ARCHITECTURE)
    # Ucas-HaoranWei/Vary-toy @ c6e40597, vary/model/vary_toy_qwen1_8.py: mm_projector, mm_projector_vary.
    CONNECTORS.register("two_linears", ARCHITECTURE, first="low", output_layer=False)
