"""SAM's image encoder, and convolutions that make features of its map: the larger tower of DeepSeek-VL-7B and Vary."""

from megavlm.architectures.towers.sam import cost
from megavlm.architectures.towers.sam.config import SamConfig, products, rules
from megavlm.architectures.towers.sam.presets import KINDS, SIZES
from megavlm.config.architecture import VISION, Architecture

SAM = Architecture(
    name="sam",
    config=SamConfig,
    build="megavlm.architectures.towers.sam.build:build",
    rules=rules,
    products=products,
    cost=cost,
)


def register() -> None:
    """Register the towers that a recipe may call it by."""
    for name, values in KINDS.items():
        VISION.register(name, SAM, **values)
    for name, (kind, values) in SIZES.items():
        VISION.register(name, SAM, **KINDS[kind], **values)
