"""Learned queries that look at the patches of pictures of any size, by their rows and columns."""

from megavlm.architectures.connectors.resampler_2d import cost
from megavlm.architectures.connectors.resampler_2d.config import Resampler2DConfig, rules
from megavlm.config.architecture import CONNECTORS, Architecture

RESAMPLER_2D = Architecture(
    name="resampler_2d",
    config=Resampler2DConfig,
    build="megavlm.architectures.connectors.resampler_2d.build:build",
    rules=rules,
    # products: none, as how many patches a product has differs from one micro-batch to the next: FP8 is refused.
    cost=cost,
)


def register() -> None:
    """Register the names that a recipe may call it by."""
    # MiniCPM-Llama3-V 2.5, and MiniCPM-V 1.0 and 2.0.
    CONNECTORS.register("resampler_2d", RESAMPLER_2D, num_queries=96, head_dim=128)
    CONNECTORS.register("minicpm_v_2_resampler", RESAMPLER_2D, num_queries=64, head_dim=128, query_positions=True)
