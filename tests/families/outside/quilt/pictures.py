"""An image plan: the picture's upper square."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megavlm.data.media import Box, Canvas, ImageLayout, ImagePlan, ImageShape, View

if TYPE_CHECKING:
    from megavlm.config.schema import ModelConfig


@dataclass(frozen=True)
class TopPlan(ImagePlan):
    """As wide as the view, and of the height what fits; what is below a flat picture is filled."""

    fixed: ClassVar[bool] = True

    def lay_out(self, shape: ImageShape) -> ImageLayout:
        """Return one view."""
        size = (self.side, max(1, round(shape.height * self.side / shape.width)))
        frame = Box(0, 0, self.side, self.side)
        canvas = Canvas(Box(0, 0, shape.width, shape.height), size, frame)
        return ImageLayout(shape, (canvas,), (View(0, frame),), (self.tokens_per_view,))


def top_plan(model: ModelConfig) -> TopPlan:
    """Return the plan of a model."""
    return TopPlan(model.vision.image_size, model.tokens_per_view, model.image.resample)
