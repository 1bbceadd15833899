"""Image plans of one square view: squashed (Qwen-VL, SigLIP), padded (LLaVA, DeepSeek-VL) or cut out (CLIP)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megavlm.config.errors import UserError
from megavlm.data.media import Box, Canvas, ImageLayout, ImagePlan, ImageShape, View, colour, register_plan

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
        short, long = sorted((shape.width, shape.height))
        longer = int(self.short_side * long / short)
        size = (self.short_side, longer) if shape.width <= shape.height else (longer, self.short_side)
        # Half a pixel too many goes to the right and below; what a small picture lacks, above and to the left.
        left, top = ((side - self.side) // 2 for side in size)
        frame = Box(left, top, left + self.side, top + self.side)
        return one_view(self, shape, Canvas(Box(0, 0, shape.width, shape.height), size, frame))


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
    return SquashPlan(model.vision.image_size, model.tokens_per_view, model.image.resample)


def _pad(model: ModelConfig) -> ImagePlan:
    return PadPlan(model.vision.image_size, model.tokens_per_view, model.image.resample, colour(model, "mean"))


def _crop(model: ModelConfig) -> ImagePlan:
    side = model.vision.image_size
    short = side if model.image.short_side is None else model.image.short_side
    return CropPlan(side, model.tokens_per_view, model.image.resample, colour(model, (0, 0, 0)), short)


def _fit(model: ModelConfig) -> ImagePlan:
    side, least = model.vision.image_size, 14 if model.image.min_side is None else model.image.min_side
    if least > side:
        raise UserError(
            f"model.image.min_side: {least} is more than the square that pictures are fitted to "
            f"(model.vision.image_size {side}); lower it"
        )
    return FitPlan(side, model.tokens_per_view, model.image.resample, colour(model, "mean"), least)


register_plan("squash", SquashPlan, _squash)
register_plan("pad", PadPlan, _pad, keys=("fill",))
register_plan("crop", CropPlan, _crop, keys=("short_side", "fill"))
register_plan("fit", FitPlan, _fit, keys=("fill", "min_side"))
