"""Two vision transformers side by side."""

from __future__ import annotations

from megavlm.architectures.context import BuildContext
from megavlm.architectures.pair_build import TowerPair
from megavlm.architectures.towers.vit.build import build as build_tower
from megavlm.architectures.towers.vit_vit.config import ViTPairConfig


def build(vision: ViTPairConfig, context: BuildContext) -> TowerPair:
    """Build the tower (the function that every module of this folder has)."""
    return TowerPair(vision, build_tower(vision.low, context), build_tower(vision.high, context))
