"""A vision transformer and SAM's tower side by side."""

from megavlm.architectures.towers.vit_sam import cost
from megavlm.architectures.towers.vit_sam.config import ViTSamConfig, products, rules
from megavlm.architectures.towers.vit_sam.presets import KINDS, SIZES
from megavlm.config.architecture import VISION, Architecture

VIT_SAM = Architecture(
    name="vit_sam",
    config=ViTSamConfig,
    build="megavlm.architectures.towers.vit_sam.build:build",
    rules=rules,
    products=products,
    cost=cost,
)


def register() -> None:
    """Register the towers that a recipe may call it by."""
    for name, values in (*KINDS.items(), *SIZES.items()):
        VISION.register(name, VIT_SAM, **values)
