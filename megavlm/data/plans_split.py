"""Idefics3's and SmolVLM's plan (arXiv 2408.12637): tiles row by row, each named, then the whole picture.

Sizes are those of Transformers' processors, which round on the way: the longer side becomes ``longest_edge``, then both
sides become multiples of a tile's, and the whole picture is made of that plane.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megavlm.config.errors import UserError
from megavlm.data.media import Box, Canvas, ImageLayout, ImagePlan, ImageRuns, ImageShape, View, register_plan

if TYPE_CHECKING:
    from megavlm.config.schema import ModelConfig

_AROUND, _WHOLE = "<fake_token_around_image>", "<global-img>"
_TILES = 4
"""Along the longer side, where nothing else is said."""


@dataclass(frozen=True)
class SplitTilesPlan(ImagePlan):
    """The picture resized by its longer side, stretched to whole tiles, and squashed to one view behind them."""

    longest_edge: int = 1456
    """What the longer side is resized to first, also of smaller pictures."""
    splitting: bool = True
    """Whether it is cut; else it is one view."""

    def lay_out(self, shape: ImageShape) -> ImageLayout:
        """Return the tiles, row by row, and the whole picture; that alone where it is no larger than a tile."""
        whole, side = Box(0, 0, shape.width, shape.height), self.side
        fitted = _fitted(shape, self.longest_edge)
        square = (side, side), Box(0, 0, side, side)
        if not self.splitting:
            return ImageLayout(shape, (Canvas(whole, *square, (fitted,)),), (View(0, square[1]),), self._runs(0, 0))
        width, height = _whole_tiles(fitted, side)
        rows, columns = height // side, width // side
        plane = Canvas(whole, (width, height), Box(0, 0, width, height), (fitted,))
        if rows * columns == 1:
            return ImageLayout(shape, (plane,), (View(0, square[1]),), self._runs(0, 0))
        views = [
            View(0, Box(column * side, row * side, (column + 1) * side, (row + 1) * side))
            for row in range(rows)
            for column in range(columns)
        ]
        last = Canvas(whole, *square, (fitted, (width, height)))
        return ImageLayout(
            shape, (plane, last), (*views, View(1, square[1])), self._runs(rows, columns), (rows, columns)
        )

    def _runs(self, rows: int, columns: int) -> ImageRuns:
        """Return what stands for a picture: each tile behind its name, a newline behind each row and behind them."""
        runs: list[int | str] = []
        for row in range(rows):
            for column in range(columns):
                newline = "\n" if row and not column else ""
                runs += [f"{newline}{_AROUND}<row_{row + 1}_col_{column + 1}>", self.tokens_per_view]
        newlines = "\n\n" if rows else ""
        return (*runs, f"{newlines}{_AROUND}{_WHOLE}", self.tokens_per_view, _AROUND)


def _fitted(shape: ImageShape, longest: int) -> tuple[int, int]:
    """Return width and height of a picture whose longer side is ``longest``; the other is even."""
    ratio = shape.width / shape.height
    wide = ratio >= 1
    shorter = int(longest / ratio) if wide else int(longest * ratio)
    shorter = max(shorter + shorter % 2, 1)
    return (longest, shorter) if wide else (shorter, longest)


def _whole_tiles(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return width and height in whole tiles: the longer side's first, then the other of nearly those proportions."""
    width, height = size
    ratio, wide = width / height, width >= height
    longer = math.ceil(max(size) / side) * side
    shorter = max(math.ceil(int(longer / ratio if wide else longer * ratio) / side) * side, side)
    return (longer, shorter) if wide else (shorter, longer)


def _split_tiles(model: ModelConfig) -> ImagePlan:
    image, side = model.image, model.vision.image_size
    longest = _TILES * side if image.longest_edge is None else image.longest_edge
    if longest < side:
        raise UserError(
            f"model.image.longest_edge: {longest} is less than a tile (model.vision.image_size {side}); raise it"
        )
    return SplitTilesPlan(side, model.tokens_per_view, image.resample, (0, 0, 0), longest, image.image_splitting)


register_plan("split_tiles", SplitTilesPlan, _split_tiles, keys=("longest_edge", "image_splitting"))
