"""VQ-GAN: a tower whose pictures are codes of a codebook (Chameleon). It is never trained."""

from megavlm.architectures.towers.vq_gan import cost
from megavlm.architectures.towers.vq_gan.config import VQGANConfig, rules
from megavlm.architectures.towers.vq_gan.presets import SIZES
from megavlm.config.architecture import VISION, Architecture

VQ_GAN = Architecture(
    name="vq_gan",
    config=VQGANConfig,
    build="megavlm.architectures.towers.vq_gan.build:build",
    rules=rules,
    # products: none that FP8 would be tried on: it is refused.
    cost=cost,
)


def register() -> None:
    """Register the towers that a recipe may call it by."""
    for name, values in SIZES.items():
        VISION.register(name, VQ_GAN, **values)
