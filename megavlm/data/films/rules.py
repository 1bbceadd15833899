"""Film plans of families whose towers take frames of any size: Qwen2-VL and after, Qwen3-VL, GLM-4.1V.

Frames, sizes, tokens and texts are those of their processors in Transformers 5.23 (``models/*/video_processing_*``
and ``processing_*``), which ``tests/data/film_vectors.py`` asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megavlm.config.errors import UserError
from megavlm.config.video import FPS, GLM_SECONDS, MOST_FRAMES
from megavlm.data.films.plan import FilmError, FilmLayout, FilmShape, PackedFilmPlan, register_film_plan
from megavlm.data.films.sampling import (
    by_seconds,
    evenly_from_the_start,
    evenly_to_the_end,
    filled,
    thinned,
    whole_patches,
)
from megavlm.data.image_header import ImageError
from megavlm.data.layouts import ImageRuns, TokenGrid
from megavlm.data.plans_native import enlarged, whole_blocks

if TYPE_CHECKING:
    from megavlm.config.schema import ModelConfig

_LEAST_FRAMES, _MOST_FRAMES = 4, 768
_LEAST_TOKENS, _MOST_TOKENS = 128, 768
_GLM_PIXELS = (112 * 112, 28 * 28 * 2 * 30000)
_SPARE = 1.05
"""A frame has at least so many times ``min_pixels``, however many there are."""
_QWEN_MARKS = ("<|vision_start|>", "<|vision_end|>")


@dataclass(frozen=True)
class RatedFilmPlan(PackedFilmPlan):
    """A plan that takes so many frames of a second."""

    fps: float = FPS
    num_frames: int | None = None
    """Frames of any film, whatever its length; None for ``fps``."""
    min_frames: int = _LEAST_FRAMES
    max_frames: int = _MOST_FRAMES
    min_pixels: int = 0
    max_pixels: int | None = None
    total_pixels: int | None = None
    sample_pixels: int | None = None

    def _total(self, shape: FilmShape) -> int | None:
        """Return the film's budget: its own, or its part of that of all that is shown."""
        part = None if self.sample_pixels is None else self.sample_pixels // shape.shown
        told = [one for one in (self.total_pixels, part) if one is not None]
        return min(told) if told else None


@dataclass(frozen=True)
class Qwen2FilmPlan(RatedFilmPlan):
    """Qwen2-VL, Qwen2.5-VL and LLaVA-OneVision-1.5: a frame has its own budget; nothing stands between the patches."""

    tokens_per_second: float | None = None
    """How far apart frames a second apart are, in positions; None for one from patch to patch."""

    def choose(self, shape: FilmShape) -> tuple[int, ...]:
        """Return frames that fill patches; of chosen ones all, or as many as there may be."""
        if shape.sampled:
            return thinned(shape.frames, self.max_frames)
        if self.num_frames is None:
            limits = (self.min_frames, self.max_frames)
            count = whole_patches(shape.frames, shape.rate, self.fps, limits, self.temporal)
        else:
            count = round(self.num_frames / self.temporal) * self.temporal or self.temporal
            count = min(count, shape.frames // self.temporal * self.temporal or shape.frames)
        return evenly_from_the_start(shape.frames, count)

    def lay_out(self, shape: FilmShape) -> FilmLayout:
        """Return frames of one size, each within its part of the budget."""
        indices, total = self.choose(shape), self._total(shape)
        assert self.max_pixels is not None
        most = self.max_pixels
        if total is not None:
            most = max(min(most, total * self.temporal // len(indices)), int(self.min_pixels * _SPARE))
        size = _fitted((shape.width, shape.height), self.patch * self.merge, (self.min_pixels, most))
        tokens = len(filled(indices, self.temporal)) // self.temporal * self.tokens_of(size)
        begin, end = _QWEN_MARKS
        return self.laid_out(shape, size, indices, (begin, tokens, end))

    def token_grids(self, layout: FilmLayout) -> tuple[TokenGrid, ...]:
        """Return one grid, its frames as far apart as they are in time where positions tell time."""
        (grid,) = super().token_grids(layout)
        if self.tokens_per_second is None:
            return (grid,)
        # The frames before the last one filled its patch, of all in the film: as VideoMetadata.sampled_fps.
        shown = len(self.choose(layout.film))
        seconds = self.temporal / (shown / layout.film.frames * layout.film.rate)
        return (grid._replace(step=self.tokens_per_second * seconds),)


@dataclass(frozen=True)
class Qwen3FilmPlan(RatedFilmPlan):
    """Qwen3-VL: all frames share one budget, and each patch in time stands behind its seconds."""

    outer_marks: bool = False

    def choose(self, shape: FilmShape) -> tuple[int, ...]:
        """Return frames from the first to the last; of chosen ones all, or as many as there may be."""
        if shape.sampled:
            return thinned(shape.frames, self.max_frames)
        wanted = self.num_frames
        if wanted is None:
            wanted = min(max(int(shape.frames / shape.rate * self.fps), self.min_frames), self.max_frames)
        return evenly_to_the_end(shape.frames, min(wanted, shape.frames))

    def lay_out(self, shape: FilmShape) -> FilmLayout:
        """Return frames of one size that together are within the budget."""
        indices, total = self.choose(shape), self._total(shape)
        assert total is not None
        if self.max_pixels is not None:
            per_frame = max(min(self.max_pixels, total // len(indices)), int(self.min_pixels * _SPARE))
            total = per_frame * len(indices)
        size = _within(self, shape, indices, (self.min_pixels, total))
        return self.laid_out(shape, size, indices, self._runs(shape, filled(indices, self.temporal), size))

    def _runs(self, shape: FilmShape, indices: tuple[int, ...], size: tuple[int, int]) -> ImageRuns:
        begin, end = _QWEN_MARKS
        runs: list[int | str] = []
        between = begin if self.outer_marks else ""
        for at in range(0, len(indices), self.temporal):
            seconds = (indices[at] / shape.rate + indices[at + self.temporal - 1] / shape.rate) / 2
            runs += [f"{between}<{seconds:.1f} seconds>{begin}", self.tokens_of(size)]
            between = end
        return (*runs, end + end if self.outer_marks else end)

    def token_grids(self, layout: FilmLayout) -> tuple[TokenGrid, ...]:
        """Return one grid a patch in time."""
        return _apart(super().token_grids(layout))


@dataclass(frozen=True)
class GlmFilmPlan(RatedFilmPlan):
    """GLM-4.1V: all frames share one budget, and the seconds stand behind each patch in time."""

    max_seconds: float = GLM_SECONDS

    def choose(self, shape: FilmShape) -> tuple[int, ...]:
        """Return frames at equal times; of chosen ones all, or as many as there may be."""
        if shape.sampled:
            return thinned(shape.frames, MOST_FRAMES)
        return by_seconds(shape.frames, shape.rate, self.fps, self.max_seconds)

    def lay_out(self, shape: FilmShape) -> FilmLayout:
        """Return frames of one size that together are within the budget."""
        indices, total = self.choose(shape), self._total(shape)
        assert total is not None
        size = _within(self, shape, indices, (self.min_pixels, total))
        tokens, runs, text = self.tokens_of(size), list[int | str](), "<|begin_of_video|>"
        for at in range(0, len(indices), self.temporal):
            runs += [f"{text}<|begin_of_image|>", tokens]
            text = f"<|end_of_image|>{int(indices[at] / shape.rate)}"
        return self.laid_out(shape, size, indices, (*runs, f"{text}<|end_of_video|>"))

    def token_grids(self, layout: FilmLayout) -> tuple[TokenGrid, ...]:
        """Return one grid a patch in time."""
        return _apart(super().token_grids(layout))


def _apart(grids: tuple[TokenGrid, ...]) -> tuple[TokenGrid, ...]:
    return tuple(TokenGrid(1, grid.rows, grid.columns) for grid in grids for _ in range(grid.frames))


def _fitted(size: tuple[int, int], *rest: Any) -> tuple[int, int]:
    """Return :func:`whole_blocks`, its error that of a film."""
    try:
        return whole_blocks(size, *rest)
    except ImageError as error:
        raise FilmError(error.cause, str(error)) from None


def _within(
    plan: PackedFilmPlan, shape: FilmShape, indices: tuple[int, ...], pixels: tuple[int, int]
) -> tuple[int, int]:
    """Return the width and height of frames that share one budget, as Qwen3-VL and GLM-4.1V count it."""
    shown, block = len(indices), plan.patch * plan.merge
    if shown < plan.temporal:
        raise FilmError("too short", f"{shown} frame(s); a patch of this model has {plan.temporal}")
    counted = round(shown / plan.temporal) * plan.temporal
    return _fitted(enlarged((shape.width, shape.height), block), block, pixels, (shown, counted))


def _common(model: ModelConfig, kind: str) -> dict[str, Any]:
    """Return what the plans of towers for frames of any size have in common.

    Raises:
        UserError: The tower takes squares, or two keys do not go together.
    """
    vision, video = model.vision, model.video
    if not vision.packed:
        raise UserError(
            f"model.video.kind: {kind} needs a tower that takes frames of any size, and {vision.preset!r} takes "
            "squares only; choose another film plan"
        )
    check_frames(model)
    given = {key: getattr(video, key) for key in _SHARED if getattr(video, key) is not None}
    return {
        "resample": model.image.resample,
        "patch": vision.patch_size,
        "merge": vision.spatial_merge_size,
        "temporal": vision.temporal_patch_size,
        "tokens_per_view": model.tokens_per_view,
        **given,
    }


def check_frames(model: ModelConfig) -> None:
    """Check the keys that say how many frames there are.

    Raises:
        UserError: Two do not go together.
    """
    video = model.video
    for key in ("num_frames", "min_frames", "max_frames"):
        if (getattr(video, key) or 0) > MOST_FRAMES:
            raise UserError(
                f"model.video.{key}: {getattr(video, key)} is more frames than are ever shown of a film "
                f"({MOST_FRAMES}); lower it"
            )
    if video.num_frames is not None:
        if video.fps is not None:
            raise UserError("model.video.num_frames: cannot stand beside model.video.fps; leave one of them out")
        if video.min_frames is not None:
            raise UserError(
                "model.video.min_frames: has no effect beside model.video.num_frames, which says how many there are; "
                "leave one of them out"
            )
        if (video.max_frames or MOST_FRAMES) < video.num_frames:
            raise UserError(
                f"model.video.max_frames: {video.max_frames} is less than model.video.num_frames ({video.num_frames}), "
                "which says how many there are; leave one of them out"
            )
    least, most = video.min_frames or _LEAST_FRAMES, video.max_frames or _MOST_FRAMES
    if least > most and (video.min_frames or video.max_frames):
        raise UserError(f"model.video.min_frames: {least} is more than model.video.max_frames ({most}); lower it")


def _check_pixels(model: ModelConfig, plan: RatedFilmPlan) -> RatedFilmPlan:
    for key in ("max_pixels", "total_pixels", "sample_pixels"):
        value = getattr(plan, key)
        if value is not None and value < plan.min_pixels:
            raise UserError(
                f"model.video.{key}: {value} is less than model.video.min_pixels ({plan.min_pixels}); correct one of "
                "them"
            )
    return plan


_SHARED = ("fps", "num_frames", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels", "sample_pixels")


def _block(model: ModelConfig) -> int:
    return (model.vision.patch_size * model.vision.spatial_merge_size) ** 2


def _qwen2(model: ModelConfig) -> Qwen2FilmPlan:
    common = _common(model, "qwen2_vl")
    if model.language.position_axes == 1:
        for key in ("tokens_per_second", "positions_after"):
            if getattr(model.video, key) != getattr(type(model.video)(), key):
                raise UserError(
                    f"model.video.{key}: says where a film lies in positions of time, rows and columns, which the "
                    "language model does not have (model.language.rotary_sections); leave it out"
                )
    least = common.setdefault("min_pixels", _LEAST_TOKENS * _block(model))
    common.setdefault("max_pixels", max(_MOST_TOKENS * _block(model), least))
    plan = Qwen2FilmPlan(**common, tokens_per_second=model.video.tokens_per_second)
    _check_pixels(model, plan)
    return plan


def _qwen3(model: ModelConfig) -> Qwen3FilmPlan:
    common = _common(model, "qwen3_vl")
    least = common.setdefault("min_pixels", _LEAST_TOKENS * _block(model))
    common.setdefault("total_pixels", max(_MOST_TOKENS * _block(model), least))
    plan = Qwen3FilmPlan(**common, outer_marks=model.video.outer_marks)
    _check_pixels(model, plan)
    key = "max_frames" if plan.num_frames is None else "num_frames"
    if getattr(plan, key) < plan.temporal:
        raise UserError(
            f"model.video.{key}: {getattr(plan, key)} is less than the {plan.temporal} frames of a patch, and every "
            "film would be refused; raise it"
        )
    return plan


def _glm(model: ModelConfig) -> GlmFilmPlan:
    common = _common(model, "glm4v")
    least = common.setdefault("min_pixels", _GLM_PIXELS[0])
    common.setdefault("total_pixels", max(_GLM_PIXELS[1], least))
    plan = GlmFilmPlan(**common, max_seconds=model.video.max_seconds or GLM_SECONDS)
    _check_pixels(model, plan)
    most = int(plan.max_seconds * plan.fps)
    if most > MOST_FRAMES:
        key = "fps" if model.video.max_seconds is None else "max_seconds"
        raise UserError(
            f"model.video.{key}: {plan.max_seconds:g} seconds of {plan.fps:g} frames are {most}, more than are ever "
            f"shown of a film ({MOST_FRAMES}); lower it"
        )
    return plan


_SIZES = ("min_pixels", "total_pixels", "sample_pixels")
_COUNTS = ("fps", "num_frames", "min_frames", "max_frames")
register_film_plan(
    "qwen2_vl", Qwen2FilmPlan, _qwen2, (*_COUNTS, *_SIZES, "max_pixels", "tokens_per_second", "positions_after")
)
register_film_plan("qwen3_vl", Qwen3FilmPlan, _qwen3, (*_COUNTS, *_SIZES, "max_pixels", "outer_marks"))
register_film_plan("glm4v", GlmFilmPlan, _glm, ("fps", *_SIZES, "max_seconds"))
