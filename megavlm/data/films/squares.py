"""Film plans of families whose towers take squares: each frame is one (LLaVA-OneVision, InternVL).

Frames, tokens and texts are those of their processors in Transformers 5.23 (``models/llava_onevision``,
``models/internvl``), which ``tests/data/film_vectors.py`` asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megavlm.config.errors import UserError
from megavlm.data.films.plan import FilmLayout, FilmPlan, FilmShape, register_film_plan
from megavlm.data.films.rules import check_frames
from megavlm.data.films.sampling import evenly_from_the_middle, evenly_in_whole_numbers, thinned
from megavlm.data.layouts import NEWLINE, Box, Canvas, FeatureIndex, ImageRuns, TokenGrid, View
from megavlm.data.media import feature_side, plan_kinds
from megavlm.data.plans_tiles import resized_grid

if TYPE_CHECKING:
    from megavlm.config.schema import ModelConfig

_LLAVA_FRAMES, _INTERN_FRAMES = 32, 8
_INTERN_MARKS = ("<img>", "</img>")


@dataclass(frozen=True)
class SquareFilmPlan(FilmPlan):
    """A plan whose frames are squashed to squares."""

    side: int = 1
    """Of a frame, in pixels."""
    tokens_per_view: int = 1
    """Features that tower and connector make of a frame."""
    num_frames: int = _LLAVA_FRAMES
    """Frames of any film, as far as it has so many."""
    fps: float | None = None
    """Frames of a second; None for ``num_frames``."""

    def wanted(self, shape: FilmShape) -> int:
        """Return how many frames are shown of a film; of chosen ones all."""
        count = self.num_frames if self.fps is None else max(1, int(shape.frames / shape.rate * self.fps))
        return min(count, shape.frames)

    def squares(self, shape: FilmShape, indices: tuple[int, ...], runs: ImageRuns) -> FilmLayout:
        """Return the layout of these frames, with what stands in the prompt."""
        whole = Box(0, 0, self.side, self.side)
        canvas = Canvas(Box(0, 0, shape.width, shape.height), whole.size, whole)
        views = (View(0, whole),) * len(indices)
        return FilmLayout(shape.picture, (canvas,), views, runs, film=shape, indices=indices)

    def features_of(self, layout: FilmLayout) -> int:
        """Return those of all frames."""
        return len(layout.views) * self.tokens_per_view

    def pixels_of(self, layout: FilmLayout) -> tuple[int, ...]:
        """Return [frames, 3, side, side]."""
        return (len(layout.views), 3, self.side, self.side)

    def views_of(self, layout: FilmLayout) -> float:
        """Return its frames."""
        return len(layout.views)


@dataclass(frozen=True)
class PooledFilmPlan(SquareFilmPlan):
    """LLaVA-OneVision: a frame's square of features is resized to half its side; one newline vector ends the film."""

    feature_side: int = 1
    """Side of the square of features that a frame becomes."""

    def choose(self, shape: FilmShape) -> tuple[int, ...]:
        """Return the first frame of each of equal parts; of chosen ones all, or as many as there may be."""
        if shape.sampled:
            return thinned(shape.frames, max(self.num_frames, 1))
        return evenly_in_whole_numbers(shape.frames, self.wanted(shape))

    @property
    def pooled_side(self) -> int:
        """Side of the square of features that is left of a frame: 14 of 27."""
        return -(-self.feature_side // 2)

    def lay_out(self, shape: FilmShape) -> FilmLayout:
        """Return the frames, with a slot for the newline vector behind them."""
        indices = self.choose(shape)
        return self.squares(shape, indices, (len(indices) * self.pooled_side**2 + 1,))

    def feature_index(self, layout: FilmLayout) -> FeatureIndex | None:
        """Return each frame's features in their order, each a mean of four, and the newline vector."""
        import numpy as np  # noqa: PLC0415 - --help imports this module

        count, side, per_frame = len(layout.views), self.feature_side, self.tokens_per_view
        own = resized_grid(np.arange(side * side).reshape(side, side), self.pooled_side, self.pooled_side)
        assert own.weight is not None
        index = (np.arange(count)[:, None, None] * per_frame + own.index).reshape(-1, 4)
        weight = np.tile(own.weight, (count, 1))
        end = np.array([[NEWLINE] * 4]), np.array([[1, 0, 0, 0]], np.float32)
        return FeatureIndex(np.concatenate([index, end[0]]), np.concatenate([weight, end[1]]))

    def token_grids(self, layout: FilmLayout) -> tuple[TokenGrid, ...]:
        """Raise UserError: with the newline vector they are no grid."""
        raise UserError(
            "model.video.kind: what stands for a film of llava_onevision is no grid of rows and columns, which "
            "model.language.rotary_sections asks for; choose another film plan"
        )


@dataclass(frozen=True)
class NamedFramesPlan(SquareFilmPlan):
    """InternVL: each frame is one tile, behind its number."""

    num_frames: int = _INTERN_FRAMES

    def choose(self, shape: FilmShape) -> tuple[int, ...]:
        """Return the frame in the middle of each of equal parts; of chosen ones all, or as many as there may be."""
        if shape.sampled:
            return thinned(shape.frames, max(self.num_frames, 1))
        return evenly_from_the_middle(shape.frames, self.wanted(shape))

    def lay_out(self, shape: FilmShape) -> FilmLayout:
        """Return the frames, each between its marks and behind its number."""
        indices, runs, text = self.choose(shape), list[int | str](), ""
        begin, end = _INTERN_MARKS
        for number in range(1, len(indices) + 1):
            runs += [f"{text}Frame{number}: {begin}", self.tokens_per_view]
            text = f"{end}\n"
        return self.squares(shape, indices, (*runs, end))

    def token_grids(self, layout: FilmLayout) -> tuple[TokenGrid, ...]:
        """Return one square a frame."""
        side = int(self.tokens_per_view**0.5)
        return (TokenGrid(1, side, side),) * len(layout.views)


def _squares(model: ModelConfig, kind: str) -> dict[str, Any]:
    vision, video = model.vision, model.video
    if vision.packed:
        raise UserError(
            f"model.video.kind: {kind} makes squares of frames, and the tower {vision.preset!r} takes patches of "
            "frames of any size; set it to qwen2_vl, or another that makes these"
        )
    check_frames(model)
    found = {"resample": model.image.resample, "side": vision.image_size, "tokens_per_view": model.tokens_per_view}
    given = {key: getattr(video, key) for key in ("fps", "num_frames") if getattr(video, key) is not None}
    return found | given


def _pooled(model: ModelConfig) -> PooledFilmPlan:
    if not plan_kinds()[model.image.kind].plan.newline:
        raise UserError(
            "model.video.kind: a film of llava_onevision ends with the learned newline vector, which a model of "
            f"model.image.kind {model.image.kind} does not have; set that to anyres_max"
        )
    return PooledFilmPlan(**_squares(model, "llava_onevision"), feature_side=feature_side(model, "llava_onevision"))


def _named(model: ModelConfig) -> NamedFramesPlan:
    return NamedFramesPlan(**_squares(model, "internvl"))


register_film_plan("llava_onevision", PooledFilmPlan, _pooled, ("fps", "num_frames"))
register_film_plan("internvl", NamedFramesPlan, _named, ("fps", "num_frames"))
