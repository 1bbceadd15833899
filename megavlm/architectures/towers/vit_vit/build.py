"""Two vision transformers side by side."""

from __future__ import annotations

from megavlm.architectures.context import BuildContext
from megavlm.architectures.pair_build import TowerPair
from megavlm.architectures.towers.vit.build import build as build_one
from megavlm.architectures.towers.vit_vit.config import ViTViTConfig


def build(vision: ViTViTConfig, context: BuildContext) -> TowerPair:
    """Build the tower (the function that every module of this folder has)."""
    return TowerPair(vision, build_one(vision.low, context), build_one(vision.high, context))
