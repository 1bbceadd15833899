"""Learned queries that look at the patches."""

from megavlm.architectures.connectors.resampler import cost
from megavlm.architectures.connectors.resampler.config import ResamplerConfig, products, rules
from megavlm.config.architecture import CONNECTORS, Architecture

RESAMPLER = Architecture(
    name="resampler",
    config=ResamplerConfig,
    build="megavlm.architectures.connectors.resampler.build:build",
    rules=rules,
    products=products,
    cost=cost,
)


def register() -> None:
    """Register the name that a recipe may call it by."""
    CONNECTORS.register("resampler", RESAMPLER, num_queries=256, head_dim=128)
