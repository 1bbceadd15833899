"""Places that were measured in a picture's stored pixels, moved to where they are once the picture stands upright."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megavlm.data.images import geometry


@dataclass(frozen=True)
class Frame:
    """The frame of pixels in which places of a picture were measured."""

    width: float
    height: float
    turn: int = 1
    """How this frame is to be turned to stand upright, 1 (not at all) to 8, as EXIF counts."""

    @property
    def upright(self) -> tuple[float, float]:
        """Width and height when it stands upright."""
        return (self.height, self.width) if self.turn >= 5 else (self.width, self.height)

    def point(self, x: float, y: float) -> tuple[float, float]:
        """Return where a point of this frame is in the upright one."""
        if self.turn in (2, 3, 7, 8):
            x = self.width - x
        if self.turn in (3, 4, 6, 7):
            y = self.height - y
        return (y, x) if self.turn >= 5 else (x, y)

    def box(self, x1: float, y1: float, x2: float, y2: float) -> tuple[float, float, float, float]:
        """Return where a box of this frame (left, top, right, bottom) is in the upright one."""
        (xa, ya), (xb, yb) = self.point(x1, y1), self.point(x2, y2)
        return min(xa, xb), min(ya, yb), max(xa, xb), max(ya, yb)


def frame_of(data: bytes, width: float | None = None, height: float | None = None) -> Frame:
    """Return the frame in which a picture's annotations were measured.

    Tools that annotate mostly see the pixels as they are stored. Where the annotations name a size whose sides are
    those of the upright picture, they were measured there.

    Args:
        data: The picture's file.
        width: Of the picture in the annotations' words; None where they have none: its stored width.
        height: As ``width``.

    Raises:
        ImageError: The picture cannot be opened.
    """
    stored = geometry(data)
    if width is None or height is None:
        return Frame(stored.width, stored.height, stored.turn)
    if stored.turn >= 5 and min(width, height) > 0 and math.isfinite(width) and math.isfinite(height):
        ratio = math.log(width / height)
        as_stored = math.log(stored.width / stored.height)
        if abs(ratio + as_stored) < abs(ratio - as_stored):
            return Frame(width, height)
    return Frame(width, height, stored.turn)
