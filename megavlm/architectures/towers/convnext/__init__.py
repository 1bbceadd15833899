"""ConvNeXt: a tower of convolutions on square images, of which several stages give features."""

from megavlm.architectures.towers.convnext import cost
from megavlm.architectures.towers.convnext.config import ConvNextConfig, products, rules
from megavlm.architectures.towers.convnext.presets import KINDS, SIZES
from megavlm.config.architecture import VISION, Architecture

CONVNEXT = Architecture(
    name="convnext",
    config=ConvNextConfig,
    build="megavlm.architectures.towers.convnext.build:build",
    rules=rules,
    products=products,
    cost=cost,
)


def register() -> None:
    """Register the towers that a recipe may call it by."""
    for name, values in KINDS.items():
        VISION.register(name, CONVNEXT, **values)
    for name, (kind, values) in SIZES.items():
        VISION.register(name, CONVNEXT, **KINDS[kind], **values)
