"""Llama 3.2 Vision's image plan (``MllamaImageProcessor``): a canvas of few tiles, and one token in the text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megavlm.config.errors import UserError
from megavlm.data.media import (
    Box,
    Canvas,
    CrossPlan,
    ImageLayout,
    ImagePlan,
    ImageShape,
    TokenGrid,
    View,
    register_plan,
)

if TYPE_CHECKING:
    from megavlm.config.schema import ModelConfig


@dataclass(frozen=True)
class CanvasTilesPlan(CrossPlan):
    """The picture, its proportions kept, in the upper left corner of the grid of tiles that it fills best.

    Its features do not stand among the tokens: layers attend to them (``model.language.cross_attention_layers``).
    """

    patch: int = 14
    """Side of a patch, in pixels."""
    max_tiles: int = 4
    tile_features: int = 1601
    """Features of a tile."""

    def lay_out(self, shape: ImageShape) -> ImageLayout:
        """Return one view, of whole tiles."""
        rows, columns = self._grid(shape)
        height, width = rows * self.side, columns * self.side
        size = self._fitted(shape, (width, height))
        frame = Box(0, 0, width, height)
        canvas = Canvas(Box(0, 0, shape.width, shape.height), size, frame)
        patches = (1, height // self.patch, width // self.patch)
        return ImageLayout(shape, (canvas,), (View(0, frame),), (1,), (rows, columns), patches=patches)

    def features_of(self, layout: ImageLayout) -> int:
        """Return those of its tiles."""
        return math.prod(layout.grid) * self.tile_features

    def views_of(self, layout: ImageLayout) -> float:
        """Return 1: the tower runs as many tiles for every picture."""
        return 1.0

    def token_grids(self, layout: ImageLayout) -> tuple[TokenGrid, ...]:
        """Refuse: its features lie nowhere among the tokens.

        Raises:
            UserError: Always.
        """
        raise UserError(
            "model.image.kind: a picture is one token, and has no rows and columns, which the positions of this"
            " language model need; take another image plan"
        )

    def _grid(self, shape: ImageShape) -> tuple[int, int]:
        """Rows and columns: of those that enlarge the picture the least, else of those that shrink it the least."""
        numbers = range(1, self.max_tiles + 1)
        scales = {
            (rows, columns): min(rows * self.side / shape.height, columns * self.side / shape.width)
            for rows in numbers
            for columns in numbers
            if rows * columns <= self.max_tiles
        }
        larger = [scale for scale in scales.values() if scale >= 1]
        chosen = min(larger) if larger else max(scales.values())
        return min((grid for grid, scale in scales.items() if scale == chosen), key=math.prod)

    def _fitted(self, shape: ImageShape, canvas: tuple[int, int]) -> tuple[int, int]:
        """Return the width and height of the picture: at least a tile's along one side, at most the canvas's."""
        width, height = (
            min(max(length, self.side), most) for length, most in zip((shape.width, shape.height), canvas, strict=True)
        )
        across, down = width / shape.width, height / shape.height
        if across < down:
            return width, min(math.floor(shape.height * across) or 1, height)
        return min(math.floor(shape.width * down) or 1, width), height


def _canvas_tiles(model: ModelConfig) -> ImagePlan:
    vision = model.vision
    if not vision.packed or getattr(vision, "max_num_tiles", None) is None:
        raise UserError(
            f"model.image.kind: canvas_tiles needs a tower that sees all tiles of a picture together, and"
            f" {vision.preset!r} does not; choose another image plan, or take mllama_vit"
        )
    return CanvasTilesPlan(
        vision.image_size, model.tokens_per_view, model.image.resample, (0, 0, 0), patch=vision.patch_size,
        max_tiles=vision.max_num_tiles, tile_features=vision.tile_features,
    )  # fmt: skip


register_plan("canvas_tiles", CanvasTilesPlan, _canvas_tiles)
