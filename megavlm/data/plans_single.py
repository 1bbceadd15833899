"""Image plans of one square view: squashed (Qwen-VL, SigLIP), padded (LLaVA, DeepSeek-VL) or cut out (CLIP).

And of two that a pair of towers sees as one: DeepSeek-VL-7B's and Vary's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megavlm.config.errors import UserError
from megavlm.data.media import Box, Canvas, ImageLayout, ImagePlan, ImageShape, TokenGrid, View, colour, register_plan

if TYPE_CHECKING:
    from megavlm.config.schema import ModelConfig


@dataclass(frozen=True)
class SquashPlan(ImagePlan):
    """The whole picture, resized to a square whatever its proportions."""

    fixed: ClassVar[bool] = True

    def lay_out(self, shape: ImageShape) -> ImageLayout:
        """Return one view."""
        return one_view(self, shape, squashed(shape, self.side))


@dataclass(frozen=True)
class PadPlan(ImagePlan):
    """The picture in the middle of a square of its longer side, which is then resized."""

    fixed: ClassVar[bool] = True

    def lay_out(self, shape: ImageShape) -> ImageLayout:
        """Return one view."""
        return one_view(self, shape, padded(shape, self.side))


@dataclass(frozen=True)
class CropPlan(ImagePlan):
    """The picture resized by its shorter side, and the square in its middle."""

    short_side: int = 0
    """What the shorter side is resized to."""

    fixed: ClassVar[bool] = True

    def lay_out(self, shape: ImageShape) -> ImageLayout:
        """Return one view."""
        return one_view(self, shape, cropped(shape, self.side, self.short_side))


@dataclass(frozen=True)
class FitPlan(ImagePlan):
    """DeepSeek-VL: the picture resized by its longer side, in the middle of a square.

    ``pad`` fills first and resizes then, so that colours mix along the border; here they do not.
    """

    min_side: int = 14
    """Least length of the shorter side, in pixels; narrower pictures lose their proportions."""

    fixed: ClassVar[bool] = True

    def lay_out(self, shape: ImageShape) -> ImageLayout:
        """Return one view."""
        scale = self.side / max(shape.width, shape.height)
        size = max(round(shape.width * scale), self.min_side), max(round(shape.height * scale), self.min_side)
        left, top = ((self.side - length) // 2 for length in size)
        frame = Box(-left, -top, self.side - left, self.side - top)
        return one_view(self, shape, Canvas(Box(0, 0, shape.width, shape.height), size, frame))


@dataclass(frozen=True)
class PairPlan(ImagePlan):
    """Two squares of a picture, for two towers; their pixels stand in one row, those of the first tower first."""

    small: int = 0
    """Side of the first tower's square, in pixels."""

    fixed: ClassVar[bool] = True
    square: ClassVar[bool] = False
    joined: ClassVar[bool] = True

    @property
    def sides(self) -> tuple[int, ...]:
        """Both."""
        return self.small, self.side

    @property
    def row(self) -> tuple[int, ...]:
        """F: colours, rows and columns of either."""
        return (3 * (self.small**2 + self.side**2),)

    def both(self, shape: ImageShape, small: Canvas, large: Canvas) -> ImageLayout:
        """Return two views, which are one to the model."""
        views = tuple(View(number, Box(0, 0, side, side)) for number, side in enumerate(self.sides))
        return ImageLayout(shape, (small, large), views, (self.tokens_per_view,))

    def features_of(self, layout: ImageLayout) -> int:
        """Return those of one view."""
        return self.tokens_per_view

    def pixels_of(self, layout: ImageLayout) -> tuple[int, ...]:
        """Return [1, F]."""
        return (1, *self.row)

    def views_of(self, layout: ImageLayout) -> float:
        """Return one."""
        return 1.0

    def token_grids(self, layout: ImageLayout) -> tuple[TokenGrid, ...]:
        """Return the grid of both towers' features."""
        return super().token_grids(dataclasses.replace(layout, views=layout.views[:1]))


@dataclass(frozen=True)
class FitPairPlan(PairPlan, FitPlan):
    """DeepSeek-VL-7B: what ``fit`` makes, for the second of two towers; and that made smaller, for the first."""

    def lay_out(self, shape: ImageShape) -> ImageLayout:
        """Return two views, which are one to the model."""
        large = FitPlan.lay_out(self, shape).canvases[0]
        return self.both(shape, dataclasses.replace(large, last=(self.small, self.small)), large)


@dataclass(frozen=True)
class CropSquashPlan(PairPlan):
    """Vary: what ``crop`` makes, for the first of two towers; and what ``squash`` makes, for the second."""

    def lay_out(self, shape: ImageShape) -> ImageLayout:
        """Return two views, which are one to the model."""
        return self.both(shape, cropped(shape, self.small, self.small), squashed(shape, self.side))


@dataclass(frozen=True)
class SquashPairPlan(PairPlan):
    """CogAgent, Cobra: the whole picture, resized to the square of each of two towers.

    Each is made of the picture itself.
    """

    def lay_out(self, shape: ImageShape) -> ImageLayout:
        """Return two views, which are one to the model."""
        return self.both(shape, squashed(shape, self.small), squashed(shape, self.side))


def cropped(shape: ImageShape, side: int, short_side: int) -> Canvas:
    """Return the square in the middle of the picture, whose shorter side is resized to ``short_side`` before."""
    short, long = sorted((shape.width, shape.height))
    longer = int(short_side * long / short)
    size = (short_side, longer) if shape.width <= shape.height else (longer, short_side)
    # Half a pixel too many goes to the right and below; what a small picture lacks, above and to the left.
    left, top = ((length - side) // 2 for length in size)
    frame = Box(left, top, left + side, top + side)
    return Canvas(Box(0, 0, shape.width, shape.height), size, frame)


def squashed(shape: ImageShape, side: int) -> Canvas:
    """Return a square that the whole picture is resized to."""
    return stretched(shape, side, side)


def stretched(shape: ImageShape, width: int, height: int) -> Canvas:
    """Return a plane that the whole picture is resized to."""
    return Canvas(Box(0, 0, shape.width, shape.height), (width, height), Box(0, 0, width, height))


def padded(shape: ImageShape, side: int) -> Canvas:
    """Return a square that the picture in the middle of a larger square is resized to."""
    longer = max(shape.width, shape.height)
    left, top = (longer - shape.width) // 2, (longer - shape.height) // 2
    return Canvas(Box(-left, -top, longer - left, longer - top), (side, side), Box(0, 0, side, side))


def one_view(plan: ImagePlan, shape: ImageShape, canvas: Canvas) -> ImageLayout:
    """Return a layout of one view, which is the whole canvas."""
    view = View(0, Box(0, 0, *canvas.frame.size))
    return ImageLayout(shape, (canvas,), (view,), (plan.tokens_per_view,))


def _squash(model: ModelConfig) -> ImagePlan:
    return SquashPlan(model.vision.sides[-1], model.tokens_per_view, model.image.resample)


def _pad(model: ModelConfig) -> ImagePlan:
    return PadPlan(model.vision.sides[-1], model.tokens_per_view, model.image.resample, colour(model, "mean"))


def _crop(model: ModelConfig) -> ImagePlan:
    side = model.vision.sides[-1]
    short = side if model.image.short_side is None else model.image.short_side
    return CropPlan(side, model.tokens_per_view, model.image.resample, colour(model, (0, 0, 0)), short)


def _fit(model: ModelConfig) -> ImagePlan:
    side, least = model.vision.sides[-1], 14 if model.image.min_side is None else model.image.min_side
    _check_least(least, side, "model.vision.image_size")
    return FitPlan(side, model.tokens_per_view, model.image.resample, colour(model, "mean"), least)


def _sides(model: ModelConfig, instead: str) -> tuple[int, int]:
    """Return the sides of the squares of two towers.

    Raises:
        UserError: the tower takes one.
    """
    sides = model.vision.sides
    if len(sides) != 2:
        raise UserError(
            f"model.image.kind: {model.image.kind} makes two renderings of a picture, and the tower "
            f"{model.vision.preset!r} takes one; set it to {instead}"
        )
    return sides[0], sides[1]


def _crop_squash(model: ModelConfig) -> ImagePlan:
    small, large = _sides(model, "crop or squash")
    return CropSquashPlan(large, model.tokens_per_view, model.image.resample, small=small)


def _fit_pair(model: ModelConfig) -> ImagePlan:
    least = 14 if model.image.min_side is None else model.image.min_side
    small, large = _sides(model, "fit")
    if small > large:
        raise UserError(
            f"model.vision.image_size: {small} is more than the second tower's {large} (model.vision.high_image_size), "
            "of whose rendering the first one's is made; lower it"
        )
    _check_least(least, large, "model.vision.high_image_size")
    fill = colour(model, "mean", model.vision.high_image_mean)
    return FitPairPlan(large, model.tokens_per_view, model.image.resample, fill, least, small)


def _squash_pair(model: ModelConfig) -> ImagePlan:
    small, large = _sides(model, "squash")
    return SquashPairPlan(large, model.tokens_per_view, model.image.resample, small=small)


def _check_least(least: int, side: int, key: str) -> None:
    if least > side:
        raise UserError(
            f"model.image.min_side: {least} is more than the square that pictures are fitted to ({key} {side}); lower"
            " it"
        )


register_plan("squash", SquashPlan, _squash)
register_plan("pad", PadPlan, _pad, keys=("fill",))
register_plan("crop", CropPlan, _crop, keys=("short_side", "fill"))
register_plan("fit", FitPlan, _fit, keys=("fill", "min_side"))
register_plan("fit_pair", FitPairPlan, _fit_pair, keys=("fill", "min_side"))
register_plan("crop_squash", CropSquashPlan, _crop_squash)
register_plan("squash_pair", SquashPairPlan, _squash_pair)
