"""How a model sees a picture, for people: where its planes, views, padding and blocks lie, as parts of their sides.

It is read off the picture's layout (:mod:`megavlm.data.media`), whatever kind of plan made it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megavlm.data.media import Canvas, ImageLayout, ImagePlan, ImageShape

Place = tuple[float, float, float, float]
"""Left, top, width and height, as parts of a plane's sides; may reach beyond it (what is cropped)."""


@dataclass(frozen=True)
class SeenPlane:
    """A plane that views are cut from."""

    size: tuple[int, int]
    """Width and height in pixels."""
    picture: Place
    """Where the picture lies; what it leaves free is padding."""
    views: tuple[Place, ...]
    """In the order in which the tower sees them."""
    blocks: tuple[int, int] | None = None
    """Columns and rows of the blocks of patches that become a token each, of a picture that keeps its own size."""

    @property
    def padded(self) -> bool:
        """Whether a part of it is padding."""
        left, top, width, height = self.picture
        least = 0.5 / max(self.size)
        return left > least or top > least or left + width < 1 - least or top + height < 1 - least


def seen(plan: ImagePlan, layout: ImageLayout) -> list[SeenPlane]:
    """Return the planes of a picture's layout."""
    planes = []
    for number, canvas in enumerate(layout.canvases):
        width, height = canvas.size
        views = tuple(
            (view.box.left / width, view.box.top / height, view.box.size[0] / width, view.box.size[1] / height)
            for view in layout.views
            if view.canvas == number
        )
        blocks = None
        if layout.patches is not None:
            grid = plan.token_grids(layout)[0]
            blocks = grid.columns, grid.rows
        planes.append(SeenPlane((width, height), _place(canvas, layout.shape), views, blocks))
    return planes


def said(plan: ImagePlan, layout: ImageLayout) -> str:
    """Return in a few words what a picture becomes."""
    words = []
    for plane in seen(plan, layout):
        size = f"{plane.size[0]} x {plane.size[1]}"
        if plane.blocks is not None:
            words.append(f"resized to {size}, {plane.blocks[0]} x {plane.blocks[1]} blocks")
        elif len(plane.views) > 1:
            across = len({left for left, *_ in plane.views})
            wide, tall = (round(side * part) for side, part in zip(plane.size, plane.views[0][2:], strict=True))
            words.append(f"{across} x {len(plane.views) // across} tiles of {wide} x {tall}")
        else:
            words.append(f"{'one view' if len(layout.views) == 1 else 'whole'} at {size}")
        if plane.padded:
            words[-1] += ", padded"
    return f"{' + '.join(words)}: {layout.tokens:,} tokens"


def token_range(plan: ImagePlan) -> tuple[int, int, int]:
    """Return the fewest and the most tokens of a picture that is shown alone, and the most views; of usual shapes."""
    side = 1 if plan.fixed else 64 * plan.side
    shapes = [(side, side), (side, max(1, side // 2)), (max(1, side // 2), side), (1, 1), (plan.side, plan.side)]
    shapes += [(3 * plan.side, plan.side), (plan.side, 3 * plan.side), (4 * plan.side, 3 * plan.side)]
    layouts = [plan.plan(min(width, 6000), min(height, 6000)) for width, height in shapes]
    tokens = [layout.tokens for layout in layouts]
    return min(tokens), max(tokens), max(len(layout.views) for layout in layouts)


def _place(canvas: Canvas, shape: ImageShape) -> Place:
    """Return where the whole picture lies on a canvas."""
    across = canvas.resized[0] / canvas.source.size[0]
    down = canvas.resized[1] / canvas.source.size[1]
    width, height = canvas.frame.size
    left = -canvas.source.left * across - canvas.frame.left
    top = -canvas.source.top * down - canvas.frame.top
    place = (left / width, top / height, shape.width * across / width, shape.height * down / height)
    assert all(map(math.isfinite, place))
    return place
