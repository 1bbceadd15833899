"""MiniCPM-V's plan (LLaVA-UHD, arXiv 2403.11703): an overview, and slices that are not square, each with its markup."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megavlm.config.errors import UserError
from megavlm.data.media import (
    Box,
    Canvas,
    ImageLayout,
    ImagePlan,
    ImageRuns,
    ImageShape,
    PackedPlan,
    TokenGrid,
    View,
    register_plan,
)
from megavlm.data.plans_single import stretched
from megavlm.data.plans_tiles import tile_limits

if TYPE_CHECKING:
    from megavlm.config.schema import ModelConfig


@dataclass(frozen=True)
class SlicesPlan(PackedPlan):
    """An overview of the picture and, where it is larger than one view, slices of nearly its proportions.

    ``side`` is MiniCPM-V's ``scale_resolution``: views have about the area of its square. They are not square, so that
    a tower for pictures of any size sees them, each by itself.
    """

    max_tiles: int = 9
    multiple: int = 14
    """Sides of views are multiples of this: the tower's patch."""
    markup: str = "nested"
    """``nested``: ``<slice>`` around all slices, each of them in ``<image>`` (MiniCPM-V 2.0, 2.5); ``flat``: each slice
    in ``<slice>`` (from 2.6)."""

    @property
    def patch(self) -> int:
        """Side of a patch: sides of views are multiples of it."""
        return self.multiple

    def views_of(self, layout: ImageLayout) -> float:
        """Return its patches in units of those of the square that the tower's ``image_size`` names."""
        return self.pixels_of(layout)[0] / (self.side // self.multiple) ** 2

    def token_grids(self, layout: ImageLayout) -> tuple[TokenGrid, ...]:
        """Refuse: the tokens of a slice are queries, which lie nowhere.

        Raises:
            UserError: Always.
        """
        raise UserError(
            "model.image.kind: slices become tokens that have no rows and columns, which the positions of this language"
            " model need; take another image plan"
        )

    def lay_out(self, shape: ImageShape) -> ImageLayout:
        """Return the overview, and the slices row by row."""
        grid = self._grid(shape)
        width, height = self._fit(shape.width, shape.height, enlarge=grid is None)
        overview = View(0, Box(0, 0, width, height))
        canvases = [stretched(shape, width, height)]
        if grid is None:
            return self._laid_out(shape, canvases, (overview,), None)
        columns, rows = grid
        wide, tall = self._fit(
            _nearest(shape.width, columns) / columns, _nearest(shape.height, rows) / rows, enlarge=True
        )
        canvases.append(stretched(shape, wide * columns, tall * rows))
        slices = [
            View(1, Box(column * wide, row * tall, (column + 1) * wide, (row + 1) * tall))
            for row in range(rows)
            for column in range(columns)
        ]
        return self._laid_out(shape, canvases, (overview, *slices), grid)

    def _laid_out(
        self, shape: ImageShape, canvases: list[Canvas], views: tuple[View, ...], grid: tuple[int, int] | None
    ) -> ImageLayout:
        columns, rows = grid or (1, 1)
        patches = tuple((1, view.box.size[1] // self.multiple, view.box.size[0] // self.multiple) for view in views)
        return ImageLayout(shape, tuple(canvases), views, self._runs(grid), (rows, columns), slices=patches)

    def _grid(self, shape: ImageShape) -> tuple[int, int] | None:
        """Columns and rows of the slices; None for none."""
        ideal = min(math.ceil(shape.width * shape.height / (self.side * self.side)), self.max_tiles)
        if ideal <= 1:
            return None
        wanted = math.log(shape.width / shape.height)
        best, least = (1, 1), math.inf
        for number in (ideal - 1, ideal, ideal + 1):
            if number == 1 or number > self.max_tiles:
                continue
            for columns in (one for one in range(1, number + 1) if number % one == 0):
                away = abs(wanted - math.log(columns / (number // columns)))
                if away < least:
                    best, least = (columns, number // columns), away
        return best

    def _fit(self, width: float, height: float, *, enlarge: bool) -> tuple[int, int]:
        """Return the size of a view with these proportions; a small picture keeps its size but for ``enlarge``."""
        if enlarge or width * height > self.side * self.side:
            ratio = width / height
            height = int(self.side / math.sqrt(ratio))
            width = int(height * ratio)
        return _nearest(width, self.multiple), _nearest(height, self.multiple)

    def _runs(self, grid: tuple[int, int] | None) -> ImageRuns:
        overview: ImageRuns = ("<image>", self.tokens_per_view, "</image>")
        if grid is None:
            return overview
        columns, rows = grid
        one = overview if self.markup == "nested" else ("<slice>", self.tokens_per_view, "</slice>")
        runs = list(overview) + (["<slice>"] if self.markup == "nested" else [])
        for row in range(rows):
            runs += [*(["\n"] if row else []), *one * columns]
        return _joined([*runs, *(["</slice>"] if self.markup == "nested" else [])])


def _joined(runs: list[int | str]) -> ImageRuns:
    """Join texts that stand side by side."""
    found: list[int | str] = []
    for run in runs:
        if isinstance(run, str) and found and isinstance(found[-1], str):
            found[-1] += run
        else:
            found.append(run)
    return tuple(found)


def _nearest(length: float, multiple: int) -> int:
    return max(round(length / multiple) * multiple, multiple)


def _slices(model: ModelConfig) -> ImagePlan:
    vision = model.vision
    if not vision.packed:
        raise UserError(
            f"model.image.kind: slices are not square, and the tower {vision.preset!r} takes squares only; choose "
            "another image plan, or a tower for pictures of any size"
        )
    if model.connector.spatial:
        raise UserError(
            f"model.connector.preset: {model.connector.preset} makes as many tokens as a slice has blocks, and slices "
            "have one number; take resampler_2d"
        )
    if (vision.spatial_merge_size, vision.temporal_patch_size) != (1, 1):
        raise UserError(
            "model.image.kind: slices are whole numbers of single patches (model.vision.spatial_merge_size 1, "
            "temporal_patch_size 1); choose another image plan"
        )
    return SlicesPlan(
        model.vision.image_size, model.tokens_per_view, model.image.resample, (0, 0, 0), tile_limits(model, 9)[1],
        model.vision.patch_size, model.image.slice_markup,
    )  # fmt: skip


register_plan("slices", SlicesPlan, _slices, keys=("max_tiles", "slice_markup"))
