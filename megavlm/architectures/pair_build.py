"""Two towers that see one picture, built as one (:mod:`megavlm.architectures.pair`).

Shape legend: N images, V views of an image that the first tower sees, P patches of these, W width of both towers'
features side by side.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megavlm.architectures.pair import PairConfig
from megavlm.architectures.pixels import Normaliser


class TowerPair(MegatronModule):
    """Images to features of the first tower's patches, each with the second tower's features of the same place.

    Args:
        vision: the pair's keys.
        low: the first tower.
        high: the second one.
    """

    def __init__(self, vision: PairConfig, low: Any, high: Any) -> None:
        super().__init__(config=low.config)
        self.settings = vision
        self.low, self.high = low, high
        self._normalise = Normaliser(vision.high.image_mean, vision.high.image_std)
        if vision.frozen_tower is not None:
            getattr(self, vision.frozen_tower).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: [N, F], the first tower's pixels and behind them the second's, as [3, H, W] each; or with
                ``low_from: high`` the second's, [N, 3, H, W]. uint8 (0..255), or floating point where normalised.

        Returns:
            [P, N, W]: the first tower's feature, then the second's of the same place, row by row.
        """
        low, high = self._renderings(images)
        low_PNW, views = self._encode(self.low, low), self.settings.views
        if views > 1:  # one below the other
            low_PNW = low_PNW.unflatten(1, (-1, views)).permute(2, 0, 1, 3).flatten(0, 1)
        return torch.cat([low_PNW, self._placed(self._encode(self.high, high))], dim=-1)

    def _renderings(self, images: Tensor) -> tuple[Tensor, Tensor]:
        vision = self.settings
        if vision.low_from == "plan":
            small, large = vision.sides
            low, high = images.split([3 * small**2, 3 * large**2], dim=1)
            return low.unflatten(1, (3, small, small)), high.unflatten(1, (3, large, large))
        pixels = self._normalise(images, torch.float32)
        side, tiles = vision.image_size, vision.low_tiles
        plane = _smaller(pixels, tiles * side)
        if tiles == 1:
            return plane, pixels
        seen = plane.unflatten(2, (tiles, side)).unflatten(4, (tiles, side)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        if vision.low_whole:  # of that plane, as MiniGemini's code makes it
            seen = torch.cat([_smaller(plane, side).unsqueeze(1), seen], dim=1)
        return seen.flatten(0, 1), pixels

    @staticmethod
    def _encode(tower: nn.Module, pixels: Tensor) -> Tensor:
        """Return a tower's features; a frozen one keeps nothing."""
        learns = any(p.requires_grad for p in tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            features: Tensor = tower(pixels)
        return features

    def _placed(self, high_PNW: Tensor) -> Tensor:
        """Return the second tower's features [P, N, k * k * W] of each of the first's patches, row by row."""
        k, rows, tiles = self.settings.ratio, self.settings.low.grid[0], self.settings.low_tiles
        if tiles > 1:
            high_PNW = self._tiled(high_PNW)
        if k == 1:
            return high_PNW
        x_VrkckNW = high_PNW.unflatten(0, (self.settings.views, rows, k, rows, k))
        return x_VrkckNW.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(0, 2)

    def _tiled(self, high_PNW: Tensor) -> Tensor:
        """Return the second tower's features of the first's views, one below the other: tiles of its map."""
        tiles, side = self.settings.low_tiles, self.settings.high.grid[0]
        map_HHNW = high_PNW.unflatten(0, (side, side))
        each = side // tiles
        x_ttHHNW = map_HHNW.unflatten(0, (tiles, each)).unflatten(2, (tiles, each)).transpose(1, 2)
        found = x_ttHHNW.flatten(0, 3)
        if not self.settings.low_whole:
            return found
        whole_NWHH = _smaller(map_HHNW.permute(2, 3, 0, 1).float(), each).to(high_PNW.dtype)
        return torch.cat([whole_NWHH.permute(2, 3, 0, 1).flatten(0, 1), found])


def _smaller(x: Tensor, side: int) -> Tensor:
    """Return [N, C, H, W] with another side: bilinear, without a filter."""
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
