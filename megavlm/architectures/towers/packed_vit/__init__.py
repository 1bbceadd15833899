"""Vision transformers on pictures of any size, packed in one sequence."""

from megavlm.architectures.towers.packed_vit import cost
from megavlm.architectures.towers.packed_vit.config import PackedViTConfig, rules
from megavlm.architectures.towers.packed_vit.presets import KINDS, SIZES
from megavlm.config.architecture import VISION, Architecture

PACKED_VIT = Architecture(
    name="packed_vit",
    config=PackedViTConfig,
    build="megavlm.architectures.towers.packed_vit.build:build",
    rules=rules,
    # products: none, as how many patches a product has differs from one micro-batch to the next: FP8 is refused.
    cost=cost,
)


def register() -> None:
    """Register the towers that a recipe may call it by."""
    for name, values in KINDS.items():
        VISION.register(name, PACKED_VIT, **values)
    for name, (kind, values) in SIZES.items():
        VISION.register(name, PACKED_VIT, **KINDS[kind], **values)
