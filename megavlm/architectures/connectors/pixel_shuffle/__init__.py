"""InternVL's connector: neighbouring patches become one token, through a norm and two linear layers."""

from megavlm.architectures.connectors.pixel_shuffle import cost
from megavlm.architectures.connectors.pixel_shuffle.config import PixelShuffleConfig, products, rules
from megavlm.config.architecture import CONNECTORS, Architecture

PIXEL_SHUFFLE = Architecture(
    name="pixel_shuffle",
    config=PixelShuffleConfig,
    build="megavlm.architectures.connectors.pixel_shuffle.build:build",
    rules=rules,
    products=products,
    cost=cost,
)


def register() -> None:
    """Register the name that a recipe may call it by."""
    CONNECTORS.register("pixel_shuffle", PIXEL_SHUFFLE)
