"""Image plans of several square views: LLaVA-1.6's anyres, LLaVA-OneVision's anyres_max, InternVL's dynamic tiles.

Pinpoints are [height, width] in pixels, as ``image_grid_pinpoints`` of Hugging Face configurations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megavlm.config.errors import UserError
from megavlm.data.media import (
    NEWLINE,
    Box,
    Canvas,
    FeatureIndex,
    ImageLayout,
    ImagePlan,
    ImageShape,
    View,
    colour,
    feature_side,
    register_plan,
)
from megavlm.data.plans_single import one_view, padded, squashed, stretched

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from megavlm.config.schema import ModelConfig

Pinpoints = tuple[tuple[int, int], ...]

_LLAVA_TILES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
_MAX_PINPOINTS = 1000
_MOST_TILES = 256
_ABOVE = 1.1
"""Features are interpolated where their picture's side is more than this factor above the limit."""


@dataclass(frozen=True)
class AnyresPlan(ImagePlan):
    """LLaVA-1.6: the squashed picture, then tiles of the picture padded to the best of some resolutions.

    The tiles' features are put together to one picture, the rows and columns that hold padding alone are left out, and
    a learned newline vector ends each row.
    """

    pinpoints: Pinpoints = ()
    """Height and width of the resolutions, in pixels: multiples of ``side``."""

    newline: ClassVar[bool] = True

    def lay_out(self, shape: ImageShape) -> ImageLayout:
        """Return the squashed view and the tiles, row by row."""
        height, width = best_pinpoint(shape, self.pinpoints)
        return _anyres(self, shape, (height, width), len(self._feature_rows(shape, (height, width)).index))

    def feature_index(self, layout: ImageLayout) -> FeatureIndex | None:
        """Return the squashed view's features, then rows of the picture's, each with a newline vector behind it."""
        import numpy as np  # noqa: PLC0415 - --help imports this module

        rows, columns = layout.grid
        own = self._feature_rows(layout.shape, (rows * self.side, columns * self.side))
        first = np.zeros((self.tokens_per_view, own.index.shape[1]), np.int64)
        first[:, 0] = np.arange(self.tokens_per_view)
        weight = None
        if own.weight is not None:
            ones = np.zeros(first.shape, np.float32)
            ones[:, 0] = 1
            weight = np.concatenate([ones, own.weight])
        return FeatureIndex(np.concatenate([first, own.index]), weight)

    def _feature_rows(self, shape: ImageShape, resolution: tuple[int, int]) -> FeatureIndex:
        grid = self._unpadded(shape, resolution)
        return FeatureIndex(_with_newlines(grid).reshape(-1, 1))

    def _unpadded(self, shape: ImageShape, resolution: tuple[int, int]) -> NDArray[np.int64]:
        """[rows, columns] indices of the features that see the picture, without those of padding alone."""
        import numpy as np  # noqa: PLC0415 - --help imports this module

        side, per_view = math.isqrt(self.tokens_per_view), self.tokens_per_view
        tall, wide = resolution[0] // self.side, resolution[1] // self.side
        views = 1 + np.arange(tall * wide).reshape(tall, 1, wide, 1)
        grid = views * per_view + np.arange(per_view).reshape(1, side, 1, side)
        grid = grid.reshape(tall * side, wide * side)
        rows, columns = grid.shape
        # Transformers' unpad_image, with its rounding.
        if shape.width / shape.height > columns / rows:
            kept = int(round(shape.height * (columns / shape.width), 7))
            cut = (rows - kept) // 2
            return grid[cut : rows - cut]
        kept = int(round(shape.width * (rows / shape.height), 7))
        cut = (columns - kept) // 2
        return grid[:, cut : columns - cut]


@dataclass(frozen=True)
class AnyresMaxPlan(AnyresPlan):
    """LLaVA-OneVision: as LLaVA-1.6, with more resolutions; features above a limit are interpolated (bilinear).

    Where a conversation shows several pictures, each is one padded view with a newline vector behind it.
    """

    max_tiles: int = 9
    """Tiles whose features a picture has at most; ``anyres_max_9`` is 9."""
    several: tuple[int, int, int] = (0, 0, 0)
    """Colour that pictures are padded with where there are several."""

    def lay_out(self, shape: ImageShape) -> ImageLayout:
        """Return the squashed view and the tiles, or one padded view for one of several pictures."""
        if shape.images == 1:
            return super().lay_out(shape)
        layout = one_view(self, shape, padded(shape, self.side))
        return ImageLayout(shape, layout.canvases, layout.views, (self.tokens_per_view + 1,))

    def feature_index(self, layout: ImageLayout) -> FeatureIndex | None:
        """Return the order of the features, and their weights where they are interpolated."""
        import numpy as np  # noqa: PLC0415 - --help imports this module

        if layout.shape.images == 1:
            return super().feature_index(layout)
        return FeatureIndex(np.append(np.arange(self.tokens_per_view), NEWLINE).reshape(-1, 1))

    def _feature_rows(self, shape: ImageShape, resolution: tuple[int, int]) -> FeatureIndex:
        grid = self._unpadded(shape, resolution)
        rows, columns = grid.shape
        ratio = math.sqrt(rows * columns / (self.max_tiles * self.tokens_per_view))
        if ratio <= _ABOVE:
            return FeatureIndex(_with_newlines(grid).reshape(-1, 1))
        return _interpolated(grid, int(rows // ratio), int(columns // ratio))


@dataclass(frozen=True)
class DynamicTilesPlan(ImagePlan):
    """InternVL: the picture stretched to the grid of tiles that is nearest its proportions, then a thumbnail."""

    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    """The squashed picture behind the tiles, where there is more than one."""

    def lay_out(self, shape: ImageShape) -> ImageLayout:
        """Return the tiles, row by row, and the thumbnail."""
        columns, rows = self._grid(shape)
        canvases = [stretched(shape, columns * self.side, rows * self.side)]
        views = _tiles(0, self.side, rows, columns)
        if self.thumbnail and len(views) > 1:
            canvases.append(squashed(shape, self.side))
            views.append(View(1, Box(0, 0, self.side, self.side)))
        tokens = len(views) * self.tokens_per_view
        return ImageLayout(shape, tuple(canvases), tuple(views), (tokens,), (rows, columns))

    def _grid(self, shape: ImageShape) -> tuple[int, int]:
        """Columns and rows: the nearest proportions, and of equal ones the more tiles if the picture has the pixels."""
        wanted, area = shape.width / shape.height, shape.width * shape.height
        numbers = range(1, self.max_tiles + 1)
        grids = [(c, r) for c in numbers for r in numbers if self.min_tiles <= c * r <= self.max_tiles]
        best, least = (1, 1), math.inf
        for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
            away = abs(wanted - columns / rows)
            if away < least or (away == least and area > 0.5 * self.side * self.side * columns * rows):
                best, least = (columns, rows), away
        return best


def best_pinpoint(shape: ImageShape, pinpoints: Pinpoints) -> tuple[int, int]:
    """Return height and width of the resolution that keeps most of the picture's pixels and wastes least."""
    best, most, least_waste = pinpoints[0], -1, math.inf
    for height, width in pinpoints:
        scale = min(width / shape.width, height / shape.height)
        inside = int(shape.width * scale) * int(shape.height * scale)
        kept = min(inside, shape.width * shape.height)
        waste = height * width - kept
        if kept > most or (kept == most and waste < least_waste):
            best, most, least_waste = (height, width), kept, waste
    return best


def _anyres(plan: ImagePlan, shape: ImageShape, resolution: tuple[int, int], rest: int) -> ImageLayout:
    height, width = resolution
    if width / shape.width < height / shape.height:
        size = width, min(math.ceil(shape.height * (width / shape.width)), height)
    else:
        size = min(math.ceil(shape.width * (height / shape.height)), width), height
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    fitted = Canvas(Box(0, 0, shape.width, shape.height), size, Box(-left, -top, width - left, height - top))
    rows, columns = height // plan.side, width // plan.side
    views = [View(0, Box(0, 0, plan.side, plan.side)), *_tiles(1, plan.side, rows, columns)]
    tokens = plan.tokens_per_view + rest
    return ImageLayout(shape, (squashed(shape, plan.side), fitted), tuple(views), (tokens,), (rows, columns))


def _tiles(canvas: int, side: int, rows: int, columns: int) -> list[View]:
    return [
        View(canvas, Box(column * side, row * side, (column + 1) * side, (row + 1) * side))
        for row in range(rows)
        for column in range(columns)
    ]


def _with_newlines(grid: NDArray[np.int64]) -> NDArray[np.int64]:
    import numpy as np  # noqa: PLC0415 - --help imports this module

    return np.concatenate([grid, np.full((len(grid), 1), NEWLINE)], axis=1)


def _interpolated(grid: NDArray[np.int64], rows: int, columns: int) -> FeatureIndex:
    """Return :func:`resized_grid` with newlines."""
    import numpy as np  # noqa: PLC0415 - --help imports this module

    own = resized_grid(grid, rows, columns)
    assert own.weight is not None
    end = np.array([NEWLINE] * 4), np.array([1, 0, 0, 0], np.float32)
    index = np.concatenate([own.index.reshape(rows, columns, 4), np.broadcast_to(end[0], (rows, 1, 4))], axis=1)
    weight = np.concatenate([own.weight.reshape(rows, columns, 4), np.broadcast_to(end[1], (rows, 1, 4))], axis=1)
    return FeatureIndex(index.reshape(-1, 4), weight.reshape(-1, 4))


def resized_grid(grid: NDArray[np.int64], rows: int, columns: int) -> FeatureIndex:
    """Return a grid of features resized to rows x columns, bilinear without antialiasing.

    As ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)``: each is a mean of four.
    """
    import numpy as np  # noqa: PLC0415 - --help imports this module

    above, below, down = _neighbours(rows, grid.shape[0])
    left, right, across = _neighbours(columns, grid.shape[1])
    corners = [grid[np.ix_(y, x)] for y in (above, below) for x in (left, right)]
    weights = [y[:, None] * x[None] for y in (1 - down, down) for x in (1 - across, across)]
    weight = np.stack(weights, axis=-1).astype(np.float32)
    return FeatureIndex(np.stack(corners, axis=-1).reshape(-1, 4), weight.reshape(-1, 4))


def _neighbours(count: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return for each of ``count`` points on ``size`` the neighbours on both sides, and the second one's weight."""
    import numpy as np  # noqa: PLC0415 - --help imports this module

    at = np.maximum((np.arange(count) + 0.5) * (size / count) - 0.5, 0)
    before = np.minimum(np.floor(at).astype(np.int64), size - 1)
    return before, np.minimum(before + 1, size - 1), at - before


def _pinpoints(model: ModelConfig, default: Sequence[tuple[int, int]]) -> Pinpoints:
    side = model.vision.image_size
    given = model.image.pinpoints or tuple((rows * side, columns * side) for rows, columns in default)
    for position, (height, width) in enumerate(given):
        if height < side or width < side or height % side or width % side:
            raise UserError(
                f"model.image.pinpoints.{position}: {height} x {width} is not made of tiles of {side} pixels "
                "(model.vision.image_size); give multiples of it"
            )
        if (height // side) * (width // side) > _MOST_TILES:
            raise UserError(
                f"model.image.pinpoints.{position}: {height} x {width} is {(height // side) * (width // side)} tiles; "
                f"at most {_MOST_TILES} are possible"
            )
    if len(given) > _MAX_PINPOINTS:
        raise UserError(f"model.image.pinpoints: {len(given)} resolutions; give at most {_MAX_PINPOINTS}")
    return tuple(given)


def _anyres_plan(model: ModelConfig) -> ImagePlan:
    feature_side(model, "anyres")
    return AnyresPlan(
        model.vision.image_size, model.tokens_per_view, model.image.resample, colour(model, (0, 0, 0)),
        _pinpoints(model, _LLAVA_TILES),
    )  # fmt: skip


def _anyres_max_plan(model: ModelConfig) -> ImagePlan:
    feature_side(model, "anyres_max")
    tiles = [(rows, columns) for rows in range(1, 7) for columns in range(1, 7)]
    return AnyresMaxPlan(
        model.vision.image_size, model.tokens_per_view, model.image.resample, colour(model, (0, 0, 0)),
        _pinpoints(model, tiles), 9 if model.image.max_tiles is None else model.image.max_tiles, colour(model, "mean"),
    )  # fmt: skip


def tile_limits(model: ModelConfig, most: int) -> tuple[int, int]:
    """Return ``model.image.min_tiles`` and ``max_tiles``, or 1 and ``most``.

    Raises:
        UserError: They are no limits.
    """
    image = model.image
    low, high = image.min_tiles or 1, image.max_tiles or most
    if high > _MOST_TILES:
        raise UserError(f"model.image.max_tiles: {high} tiles; at most {_MOST_TILES} are possible")
    if low > high:
        raise UserError(f"model.image.min_tiles: {low} is more than model.image.max_tiles ({high}); lower it")
    return low, high


def _dynamic_tiles_plan(model: ModelConfig) -> ImagePlan:
    low, high = tile_limits(model, 12)
    return DynamicTilesPlan(
        model.vision.image_size, model.tokens_per_view, model.image.resample, (0, 0, 0), low, high,
        model.image.thumbnail,
    )  # fmt: skip


register_plan("anyres", AnyresPlan, _anyres_plan, keys=("pinpoints", "fill"))
register_plan("anyres_max", AnyresMaxPlan, _anyres_max_plan, keys=("pinpoints", "fill", "max_tiles"))
register_plan("dynamic_tiles", DynamicTilesPlan, _dynamic_tiles_plan, keys=("min_tiles", "max_tiles", "thumbnail"))
