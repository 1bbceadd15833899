"""Film plans: what becomes of a film, in whole numbers, before a frame of it is decoded.

As :mod:`megavlm.data.media` for pictures: a plan says from the size of the frames, their number and their rate which
frames the tower sees, how large they are, how many feature tokens they become, and what stands between these. It is
asked for the length of a sample and for its pixels, and both times says the same.

A film's slots hold the same token as a picture's (``tokenizer.imgpad_id``), whatever a family's published tokenizer
calls them: the model writes its features over them. What stands around and between them is the plan's own markup, and
the template adds nothing.

This file imports neither torch nor PIL.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from megavlm.config.video import MOST_FRAMES
from megavlm.data.image_header import MAX_PIXELS, MAX_SIDE, ImageError
from megavlm.data.layouts import Box, Canvas, Colour, FeatureIndex, ImageLayout, ImageRuns, ImageShape, TokenGrid, View
from megavlm.data.plan_kinds import PlanKind, PlanKinds

if TYPE_CHECKING:
    from megavlm.config.schema import ModelConfig


class FilmError(ImageError):
    """A film that cannot be used; ``cause`` is a short name for counting."""


class FilmShape(NamedTuple):
    """What a plan asks of a film. Made from its header and the times of its frames; no frame is decoded."""

    width: int
    """Pixels of an upright frame (turned as the film's display matrix, or a frame's EXIF, says)."""
    height: int
    """Pixels of an upright frame."""
    frames: int
    """Frames of the film, at least 1."""
    rate: float
    """Frames in a second; of a film with a varying rate its mean. Frame ``i`` of a plan is what such a film shows
    ``i / rate`` seconds after its first one."""
    shown: int = 1
    """Pictures and films that its conversation shows."""
    sampled: bool = False
    """Whether the frames came one by one (a folder of them): somebody has chosen them already."""

    @property
    def seconds(self) -> float:
        """How long it takes."""
        return self.frames / self.rate

    @property
    def picture(self) -> ImageShape:
        """One of its frames, as a picture."""
        return ImageShape(self.width, self.height, self.shown)


_NO_FILM = FilmShape(0, 0, 0, 1.0)


@dataclass(frozen=True)
class FilmLayout(ImageLayout):
    """A plan for one film; ``shape`` is that of a frame, and all frames have one canvas.

    ``runs`` is all that stands for it in the prompt, marks and all: the template puts nothing around it.
    """

    film: FilmShape = _NO_FILM
    indices: tuple[int, ...] = ()
    """The frames that the tower sees, in order; the last may stand several times, where a patch needs more."""

    @property
    def times(self) -> tuple[float, ...]:
        """Seconds from the first frame of the film to each of ``indices``."""
        return tuple(index / self.film.rate for index in self.indices)


class HasFilmShape(Protocol):
    """A film: :class:`megavlm.data.films.film.Film`."""

    def shape(self, shown: int = 1) -> FilmShape:
        """Return what a plan asks of it, in a conversation of so many pictures and films."""
        ...


@dataclass(frozen=True)
class FilmPlan(ABC):
    """How films become frames and tokens. Plans are values: equal ones do the same."""

    resample: str = "bicubic"
    """``bicubic`` or ``bilinear``; always antialiased."""
    fill: Colour = (0, 0, 0)
    """Colour of what no pixel reaches."""

    @abstractmethod
    def choose(self, shape: FilmShape) -> tuple[int, ...]:
        """Return which frames are shown: increasing indices below ``shape.frames``, at least one.

        Raises:
            FilmError: There is no such choice.
        """

    @abstractmethod
    def lay_out(self, shape: FilmShape) -> FilmLayout:
        """Return the layout of a film whose sides are within the limits.

        Raises:
            FilmError: It is too long and narrow, or has too few frames.
        """

    @abstractmethod
    def features_of(self, layout: FilmLayout) -> int:
        """Return how many features tower and connector make of a film."""

    @abstractmethod
    def pixels_of(self, layout: FilmLayout) -> tuple[int, ...]:
        """Return the shape of a film's pixels; those of pictures and films are joined along the first dimension."""

    @abstractmethod
    def token_grids(self, layout: FilmLayout) -> tuple[TokenGrid, ...]:
        """Return how a film's slots lie: one grid for each stretch of slots that has no text in it."""

    @abstractmethod
    def views_of(self, layout: FilmLayout) -> float:
        """Return how many views of usual size a film is worth to the tower."""

    def feature_index(self, layout: FilmLayout) -> FeatureIndex | None:
        """Return where the features of a film go; None where they stay in their order."""
        return None

    def plan(self, shape: FilmShape) -> FilmLayout:
        """Return the layout of a film.

        Raises:
            FilmError: It has no pixels or no frames, or this plan cannot have it.
        """
        return _planned(self, shape)


@dataclass(frozen=True)
class PackedFilmPlan(FilmPlan):
    """Films for towers that take pictures of any size: frames as flat patches, of several frames each.

    ``choose``, and ``lay_out`` by way of :meth:`laid_out`, are a family's.
    """

    patch: int = 14
    """Side of a patch, in pixels."""
    merge: int = 2
    """Side of the block of patches that becomes one token."""
    temporal: int = 2
    """Frames of a patch; where the number of frames is no multiple, the last is shown again."""
    tokens_per_view: int = 1
    """Tokens of a picture of usual size."""

    def laid_out(self, shape: FilmShape, size: tuple[int, int], indices: Sequence[int], runs: ImageRuns) -> FilmLayout:
        """Return the layout of frames that are resized to ``size`` (width and height: multiples of a block).

        Args:
            shape: The film.
            size: Of its frames, for the tower.
            indices: Frames that are shown; the last one fills its patch.
            runs: What stands in the prompt.
        """
        width, height = size
        steps = -(-len(indices) // self.temporal)
        whole = Box(0, 0, width, height)
        canvas = Canvas(Box(0, 0, shape.width, shape.height), size, whole)
        shown = (*indices, *(indices[-1],) * (steps * self.temporal - len(indices)))
        return FilmLayout(
            shape.picture, (canvas,), (View(0, whole),) * len(shown), runs,
            patches=(steps, height // self.patch, width // self.patch), film=shape, indices=shown,
        )  # fmt: skip

    def tokens_of(self, size: tuple[int, int]) -> int:
        """Return the tokens of one step in time of frames of this width and height."""
        return math.prod(size) // (self.patch * self.merge) ** 2

    def features_of(self, layout: FilmLayout) -> int:
        """Return the film's tokens."""
        return layout.tokens

    def pixels_of(self, layout: FilmLayout) -> tuple[int, ...]:
        """Return [patches, F]."""
        assert layout.patches is not None
        return (math.prod(layout.patches), 3 * self.temporal * self.patch**2)

    def token_grids(self, layout: FilmLayout) -> tuple[TokenGrid, ...]:
        """Return the film's blocks of patches, one step of time after the other."""
        assert layout.patches is not None
        steps, rows, columns = layout.patches
        return (TokenGrid(steps, rows // self.merge, columns // self.merge),)

    def views_of(self, layout: FilmLayout) -> float:
        """Return its tokens in units of those of the picture that the tower's ``image_size`` names."""
        return layout.tokens / self.tokens_per_view


@functools.lru_cache(maxsize=4096)
def _planned(plan: FilmPlan, shape: FilmShape) -> FilmLayout:
    if shape.width < 1 or shape.height < 1:
        raise FilmError("no pixels", f"{shape.width} x {shape.height}")
    if shape.frames < 1 or not 0 < shape.rate < math.inf:
        raise FilmError("no frames", f"{shape.frames} frames, {shape.rate:g} a second")
    layout = plan.lay_out(shape)
    for canvas in layout.canvases:
        for width, height in (canvas.source.size, canvas.resized, canvas.frame.size):
            if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
                raise FilmError("too narrow", f"{shape.width} x {shape.height} pixels would become {width} x {height}")
    if len(layout.indices) > MOST_FRAMES:
        raise FilmError("too many frames", f"{len(layout.indices)} frames would be shown, at most {MOST_FRAMES}")
    assert all(0 <= index < shape.frames for index in layout.indices), "a plan chose frames that there are not"
    return layout


NO_FILMS = "none"
"""The kind that reads none."""


def register_film_plan(
    name: str, plan: type[FilmPlan], build: Callable[[ModelConfig], FilmPlan], keys: Sequence[str] = ()
) -> None:
    """Add a kind of film plan.

    Args:
        name: What recipes call it (``model.video.kind``).
        plan: Its class.
        build: Makes the plan of a model from ``model.video`` and the other branches; a ``UserError`` of it names the
            key, the rule and the remedy.
        keys: Keys of ``model.video`` that it looks at, besides kind; others are refused.

    Raises:
        UserError: The name is taken.
    """
    _KINDS.register(name, plan, build, keys)


def film_plan_kinds() -> dict[str, PlanKind[FilmPlan]]:
    """Return the registered kinds by name."""
    return _KINDS.all()


def film_plan_of(model: ModelConfig) -> FilmPlan | None:
    """Return the film plan of a model; None where it reads no films.

    Raises:
        UserError: The keys of ``model.video`` make none; the message starts with the key.
    """
    kind = _KINDS.chosen(model)
    return None if kind is None else kind.build(model)


_KINDS: PlanKinds[FilmPlan] = PlanKinds(
    "video", "film plan", ("megavlm.data.films.rules", "megavlm.data.films.squares"), no_plan=NO_FILMS
)
