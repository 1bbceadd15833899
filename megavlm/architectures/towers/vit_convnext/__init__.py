"""A vision transformer and ConvNeXt side by side."""

from megavlm.architectures.towers.vit_convnext import cost
from megavlm.architectures.towers.vit_convnext.config import ViTConvNextConfig, products, rules
from megavlm.architectures.towers.vit_convnext.presets import KINDS, SIZES
from megavlm.config.architecture import VISION, Architecture

VIT_CONVNEXT = Architecture(
    name="vit_convnext",
    config=ViTConvNextConfig,
    build="megavlm.architectures.towers.vit_convnext.build:build",
    rules=rules,
    products=products,
    cost=cost,
)


def register() -> None:
    """Register the towers that a recipe may call it by."""
    for name, values in (*KINDS.items(), *SIZES.items()):
        VISION.register(name, VIT_CONVNEXT, **values)
