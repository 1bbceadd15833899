"""MiniGemini's connector: what a patch finds in a second tower's features of its place, and linear layers."""

from megavlm.architectures.connectors.patch_mining import cost
from megavlm.architectures.connectors.patch_mining.config import PatchMiningConfig, products, rules
from megavlm.config.architecture import CONNECTORS, Architecture

ARCHITECTURE = Architecture(
    name="patch_mining",
    config=PatchMiningConfig,
    build="megavlm.architectures.connectors.patch_mining.build:build",
    rules=rules,
    products=products,
    cost=cost,
)


def register() -> None:
    """Register the name that a recipe may call it by."""
    CONNECTORS.register("patch_mining", ARCHITECTURE)
