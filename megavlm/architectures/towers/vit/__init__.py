"""A vision transformer on square images: Qwen-VL's, CLIP's, SigLIP's and InternViT."""

from megavlm.architectures.towers.vit import cost
from megavlm.architectures.towers.vit.config import ViTConfig, products, rules
from megavlm.architectures.towers.vit.presets import KINDS, SIZES
from megavlm.config.architecture import VISION, Architecture

VIT = Architecture(
    name="vit",
    config=ViTConfig,
    build="megavlm.architectures.towers.vit.build:build",
    rules=rules,
    products=products,
    cost=cost,
)


def register() -> None:
    """Register the towers that a recipe may call it by."""
    for name, values in KINDS.items():
        VISION.register(name, VIT, **values)
    for name, (size, values) in SIZES.items():
        VISION.register(name, VIT, **size._asdict(), **values)
