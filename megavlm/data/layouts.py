"""Values of image and film plans: shapes, views, and how features lie beside each other. See :mod:`megavlm.data.media`.

This file imports neither torch nor PIL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ImageRuns = tuple[int | str, ...]
"""What stands in a prompt for one picture: a number is so many feature slots, a text is literal markup between them."""

Colour = tuple[int, int, int]
"""Red, green and blue from 0 to 255."""


NEWLINE = -1
"""Index of the learned newline vector among features."""


class Box(NamedTuple):
    """A rectangle in pixels; right and bottom are not part of it."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.right - self.left, self.bottom - self.top


class ImageShape(NamedTuple):
    """What a plan asks of a picture."""

    width: int
    """Pixels of the upright picture (turned by its EXIF or XMP orientation)."""
    height: int
    """Pixels of the upright picture."""
    images: int = 1
    """Pictures that its conversation shows: some plans tile a picture only where it is alone."""


@dataclass(frozen=True)
class Canvas:
    """A plane that views are cut from, made of the picture in three steps; what no pixel reaches is filled."""

    source: Box
    """What is taken of the upright picture. It may reach beyond the picture (padding before the resize)."""
    resized: tuple[int, int]
    """Width and height that it is resized to."""
    frame: Box
    """What is taken of the result. It may reach beyond it (padding) or be a part (cropping)."""
    earlier: tuple[tuple[int, int], ...] = ()
    """Widths and heights that it is resized to before, one after the other (Idefics3)."""
    last: tuple[int, int] | None = None
    """Width and height that the frame is resized to in the end (the smaller of DeepSeek-VL-7B's two renderings)."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the plane."""
        return self.frame.size if self.last is None else self.last


class View(NamedTuple):
    """One picture that the tower sees."""

    canvas: int
    """Index of its canvas."""
    box: Box
    """Its part of the canvas, within the canvas's frame."""


@dataclass(frozen=True)
class FeatureIndex:
    """Which features stand at an image's T token positions."""

    index: NDArray[np.int64]
    """[T, K] features that position t is made of: view v's feature f is ``v * tokens_per_view + f``, and
    :data:`NEWLINE` the learned vector. K is 1, or 4 where features are interpolated."""
    weight: NDArray[np.float32] | None = None
    """[T, K] their weights; None for 1."""


class TokenGrid(NamedTuple):
    """How the features of a picture, or of frames of a film that stand together, lie beside each other."""

    frames: int
    rows: int
    columns: int
    step: float = 1.0
    """How much later a frame is than the one before it, in positions: of Qwen2.5-VL's films, the seconds from one to
    the next times ``tokens_per_second``."""

    @property
    def tokens(self) -> int:
        """Slots in the prompt."""
        return self.frames * self.rows * self.columns


@dataclass(frozen=True)
class ImageLayout:
    """A plan for one picture."""

    shape: ImageShape
    canvases: tuple[Canvas, ...]
    views: tuple[View, ...]
    """In the order in which the tower sees them."""
    runs: ImageRuns
    """The picture's place in the prompt; the template puts its own start and end around it."""
    grid: tuple[int, int] = (1, 1)
    """Rows and columns of the tiles, or slices."""
    patches: tuple[int, int, int] | None = None
    """Of a picture that keeps a size of its own (``plan.packed``): its frames (in temporal patches), rows and columns
    of patches. Each frame's patches stand block by block, as the connector joins them."""
    slices: tuple[tuple[int, int, int], ...] = ()
    """The same of each view, where a picture has several that keep sizes of their own."""

    @property
    def grids(self) -> tuple[tuple[int, int, int], ...]:
        """Frames, rows and columns of patches of all that the tower sees by itself; empty where it sees squares."""
        return self.slices if self.patches is None else (self.patches,)

    @property
    def tokens(self) -> int:
        """Feature slots in the prompt."""
        return sum(run for run in self.runs if isinstance(run, int))

    @property
    def markup(self) -> tuple[str, ...]:
        """Texts between the slots."""
        return tuple(run for run in self.runs if isinstance(run, str))
