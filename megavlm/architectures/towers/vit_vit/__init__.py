"""Two vision transformers side by side."""

from megavlm.architectures.towers.vit_vit import cost
from megavlm.architectures.towers.vit_vit.config import ViTPairConfig, products, rules
from megavlm.architectures.towers.vit_vit.presets import KINDS, SIZES
from megavlm.config.architecture import VISION, Architecture

VIT_VIT = Architecture(
    name="vit_vit",
    config=ViTPairConfig,
    build="megavlm.architectures.towers.vit_vit.build:build",
    rules=rules,
    products=products,
    cost=cost,
)


def register() -> None:
    """Register the towers that a recipe may call it by."""
    for name, values in (*KINDS.items(), *SIZES.items()):
        VISION.register(name, VIT_VIT, **values)
