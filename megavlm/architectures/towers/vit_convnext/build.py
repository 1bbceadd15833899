"""A vision transformer and ConvNeXt side by side."""

from __future__ import annotations

from megavlm.architectures.context import BuildContext
from megavlm.architectures.pair_build import TowerPair
from megavlm.architectures.towers.convnext.build import build as build_high
from megavlm.architectures.towers.vit.build import build as build_low
from megavlm.architectures.towers.vit_convnext.config import ViTConvNextConfig


def build(vision: ViTConvNextConfig, context: BuildContext) -> TowerPair:
    """Build the tower (the function that every module of this folder has)."""
    return TowerPair(vision, build_low(vision.low, context), build_high(vision.high, context))
