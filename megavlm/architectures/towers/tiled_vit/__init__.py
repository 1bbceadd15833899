"""Vision transformers on the tiles of a picture, all of which attend to each other: Llama 3.2 Vision's tower."""

from megavlm.architectures.towers.tiled_vit import cost
from megavlm.architectures.towers.tiled_vit.config import TiledViTConfig, rules
from megavlm.architectures.towers.tiled_vit.presets import KINDS, SIZES
from megavlm.config.architecture import VISION, Architecture

TILED_VIT = Architecture(
    name="tiled_vit",
    config=TiledViTConfig,
    build="megavlm.architectures.towers.tiled_vit.build:build",
    rules=rules,
    # products: none: FP8 is refused.
    cost=cost,
)


def register() -> None:
    """Register the towers that a recipe may call it by."""
    for name, values in KINDS.items():
        VISION.register(name, TILED_VIT, **values)
    for name, (kind, values) in SIZES.items():
        VISION.register(name, TILED_VIT, **KINDS[kind], **values)
