"""Qwen2-VL's connector: blocks of patches become one token, through a norm and two linear layers."""

from megavlm.architectures.connectors.patch_merger import cost
from megavlm.architectures.connectors.patch_merger.config import PatchMergerConfig, rules
from megavlm.config.architecture import CONNECTORS, Architecture

PATCH_MERGER = Architecture(
    name="patch_merger",
    config=PatchMergerConfig,
    build="megavlm.architectures.connectors.patch_merger.build:build",
    rules=rules,
    # products: none, as how many tokens a product has differs from one micro-batch to the next: FP8 is refused.
    cost=cost,
)


def register() -> None:
    """Register the name that a recipe may call it by."""
    CONNECTORS.register("patch_merger", PATCH_MERGER)
