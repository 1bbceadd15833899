"""Where the boxes that a model writes lie in a picture: the one place that evaluation, panels, pages and tools ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megavlm.data.box_notations import FoundBox, Place, find_boxes
from megavlm.data.layouts import ImageLayout
from megavlm.data.media import ImagePlan
from megavlm.data.seen import seen

ReadBoxes = Callable[[str], Sequence[FoundBox]]
"""Returns the boxes of a text about one picture, as parts of its sides."""


@dataclass(frozen=True)
class BoxSpace:
    """What the numbers of a model's boxes count beside thousandths of the picture's sides."""

    plan: ImagePlan
    pixels: bool = False
    """Whether ``bbox_2d`` counts pixels of the picture as the model sees it."""
    plane: bool = False
    """Whether bare numbers are parts of the plane that the picture lies on, its padding with it."""

    def find(self, answer: str, layout: ImageLayout) -> list[FoundBox]:
        """Return the boxes of an answer, as parts of the picture that ``layout`` is of."""
        size = layout.canvases[0].resized if self.pixels else None
        # Of several planes the model sees the whole picture on one: no padding is to be reckoned with.
        place = seen(self.plan, layout)[0].picture if self.plane and len(layout.canvases) == 1 else None
        return find_boxes(answer, pixels_of=size, parts_of=place)

    def of(self, size: tuple[int, int]) -> ReadBoxes:
        """Return what reads boxes in a picture of this width and height, upright.

        Raises:
            ImageError: its size counts, and the model cannot have such a picture.
        """
        if not (self.pixels or self.plane):
            return find_boxes
        layout = self.plan.plan(*size)
        return lambda answer: self.find(answer, layout)


def on_first_view(sides: Place, plan: ImagePlan, layout: ImageLayout) -> Place | None:
    """Return where a box of a picture lies in the first view that the model sees of it.

    Args:
        sides: left, top, right and bottom, as parts of the picture.
        plan: what becomes of pictures.
        layout: of this one.

    Returns:
        The same as parts of the view, cut at its edges; None where nothing of the box is in it.
    """
    plane = seen(plan, layout)[layout.views[0].canvas if layout.views else 0]
    left, top, width, height = plane.picture
    on_plane = (left + sides[0] * width, top + sides[1] * height, left + sides[2] * width, top + sides[3] * height)
    at, down, across, deep = plane.views[0] if plane.views else (0.0, 0.0, 1.0, 1.0)
    x1, y1, x2, y2 = (
        min(1.0, max(0.0, part))
        for part in (
            (on_plane[0] - at) / across, (on_plane[1] - down) / deep,
            (on_plane[2] - at) / across, (on_plane[3] - down) / deep,
        )
    )  # fmt: skip
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None
