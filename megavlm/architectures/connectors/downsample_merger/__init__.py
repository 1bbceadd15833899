"""GLM-4.1V's connector: a convolution makes a token of a block of patches, and a gated MLP follows."""

from megavlm.architectures.connectors.downsample_merger import cost
from megavlm.architectures.connectors.downsample_merger.config import DownsampleMergerConfig, rules
from megavlm.config.architecture import CONNECTORS, Architecture

DOWNSAMPLE_MERGER = Architecture(
    name="downsample_merger",
    config=DownsampleMergerConfig,
    build="megavlm.architectures.connectors.downsample_merger.build:build",
    rules=rules,
    # products: none, as how many tokens a product has differs from one micro-batch to the next: FP8 is refused.
    cost=cost,
)


def register() -> None:
    """Register the name that a recipe may call it by."""
    CONNECTORS.register("downsample_merger", DOWNSAMPLE_MERGER)
