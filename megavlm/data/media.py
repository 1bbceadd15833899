"""Image plans: what becomes of a picture, in whole numbers, before a pixel of it is decoded.

A plan says from the width and height of a picture which views of it the tower sees, how many feature tokens these
become and in which order, and what stands between them. Packer, planner, template and server ask it from the file's
header alone; :mod:`megavlm.data.render` makes the pixels. The kinds of this package are in ``plans_*.py`` beside this
file; another package registers its own by :func:`register_plan`.

This file imports neither torch nor PIL.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from megavlm.config.checks import TEXT_TOKENS, add_rule
from megavlm.config.errors import UserError
from megavlm.data.films.plan import FilmError, FilmLayout, FilmPlan, FilmShape, film_plan_of
from megavlm.data.image_header import MAX_PIXELS, MAX_SIDE, ImageError
from megavlm.data.layouts import (
    NEWLINE,
    Box,
    Canvas,
    Colour,
    FeatureIndex,
    ImageLayout,
    ImageRuns,
    ImageShape,
    TokenGrid,
    View,
)
from megavlm.data.plan_kinds import PlanKind, PlanKinds

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from megavlm.config.schema import ModelConfig, Recipe


__all__ = [
    "NEWLINE",
    "Arrangement",
    "Box",
    "Canvas",
    "Colour",
    "FeatureIndex",
    "ImageLayout",
    "ImagePlan",
    "ImageRuns",
    "ImageShape",
    "PackedPlan",
    "PlanKind",
    "TokenGrid",
    "View",
    "arrange",
    "colour",
    "feature_side",
    "image_rules",
    "joined",
    "layouts_of",
    "pixels_of",
    "plan_kinds",
    "plan_of",
    "register_plan",
    "views_of",
]


@dataclass(frozen=True)
class ImagePlan(ABC):
    """How pictures become views and tokens. Plans are values: equal ones do the same."""

    side: int
    """Side of a view in pixels (of slices: of a square of the same area)."""
    tokens_per_view: int
    """Features that tower and connector make of one view."""
    resample: str = "bicubic"
    """``bicubic``, ``bilinear`` or ``lanczos``; always antialiased."""
    fill: Colour = (0, 0, 0)
    """Colour of what no pixel reaches."""
    films: FilmPlan | None = dataclasses.field(default=None, repr=False, kw_only=True)
    """What becomes of films; None where they are not read. Not told among the values of a plan of pictures: saved
    states from before films still fit."""

    fixed: ClassVar[bool] = False
    """Whether every picture has the same views and tokens: its size need not be known."""
    newline: ClassVar[bool] = False
    """Whether the model learns a newline vector that stands among the features."""
    square: ClassVar[bool] = True
    """Whether all views are ``side`` x ``side``."""
    joined: ClassVar[bool] = False
    """Whether the views of a picture are one to the model: renderings for several towers, whose pixels stand in one row
    of numbers."""
    packed: ClassVar[bool] = False
    """Whether pictures keep sizes of their own: their pixels are flat patches, with the grid of each picture."""

    @abstractmethod
    def lay_out(self, shape: ImageShape) -> ImageLayout:
        """Return the layout of a picture whose sides are within the limits."""

    def feature_index(self, layout: ImageLayout) -> FeatureIndex | None:
        """Return where the features of a picture go; None where they stay in the order of its views."""
        return None

    def features_of(self, layout: ImageLayout) -> int:
        """Return how many features tower and connector make of a picture."""
        return len(layout.views) * self.tokens_per_view

    def pixels_of(self, layout: ImageLayout) -> tuple[int, ...]:
        """Return the shape of a picture's pixels; those of several pictures are joined along the first dimension."""
        return (len(layout.views), *self.row)

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of the renderings of a picture, or of one of its tiles, that the towers get."""
        return (self.side,)

    @property
    def row(self) -> tuple[int, ...]:
        """Shape of what :meth:`pixels_of` counts: a view."""
        return (3, self.side, self.side)

    def token_grids(self, layout: ImageLayout) -> tuple[TokenGrid, ...]:
        """Return how a picture's slots lie beside each other, for models whose positions have rows and columns.

        Raises:
            UserError: They lie on no grid.
        """
        side = math.isqrt(self.tokens_per_view)
        if self.newline or side**2 != self.tokens_per_view or layout.tokens != len(layout.views) * side**2:
            raise UserError(
                "model.image.kind: what stands for a picture is no grid of rows and columns, which "
                "model.language.rotary_sections asks for; take native, squash or another plan of whole squares"
            )
        return (TokenGrid(1, side, side),) * len(layout.views)

    def views_of(self, layout: ImageLayout) -> float:
        """Return how many views of usual size a picture is worth to the tower."""
        return len(layout.views)

    def plan(self, width: int, height: int, images: int = 1) -> ImageLayout:
        """Return the layout of an upright picture.

        Args:
            width: In pixels.
            height: In pixels.
            images: Pictures that its conversation shows.

        Raises:
            ImageError: It has no pixels, or is too long and narrow: this plan would make too large a plane of it.
        """
        return _planned(self, ImageShape(width, height, 1 if self.fixed else images))

    def of(self, shape: ImageShape | FilmShape) -> ImageLayout:
        """Return the layout of a picture or film.

        Raises:
            ImageError: As :meth:`plan`; or it is a film, and these are not read, or not such ones.
        """
        if not isinstance(shape, FilmShape):
            return self.plan(*shape)
        if self.films is None:
            raise FilmError("not read", "model.video.kind is none; set it to the family's film plan")
        return self.films.plan(shape)

    def maker(self, layout: ImageLayout) -> ImagePlan | FilmPlan:
        """Return the plan that a layout is of: this one, or that of films."""
        if not isinstance(layout, FilmLayout):
            return self
        assert self.films is not None, "a film was laid out by another plan"
        return self.films


class PackedPlan(ImagePlan):
    """A plan whose views are flat patches, each view with a grid of its own."""

    square: ClassVar[bool] = False
    packed: ClassVar[bool] = True

    @property
    @abstractmethod
    def patch(self) -> int:
        """Side of a patch, in pixels."""

    @property
    def merge(self) -> int:
        """Side of the block of patches that becomes one token."""
        return 1

    @property
    def temporal(self) -> int:
        """Frames of a patch; a picture is shown in each of them."""
        return 1

    def pixels_of(self, layout: ImageLayout) -> tuple[int, ...]:
        """Return [patches, F]."""
        return (sum(math.prod(grid) for grid in layout.grids), *self.row)

    @property
    def row(self) -> tuple[int, ...]:
        """F, the numbers of a patch: colours, frames, rows, columns."""
        return (3 * self.temporal * self.patch**2,)


class CrossPlan(PackedPlan):
    """A plan for layers that attend to features of pictures: each picture is one token of the text."""


@functools.lru_cache(maxsize=4096)
def _planned(plan: ImagePlan, shape: ImageShape) -> ImageLayout:
    if shape.width < 1 or shape.height < 1:
        raise ImageError("no pixels", f"{shape.width} x {shape.height}")
    layout = plan.lay_out(shape)
    for canvas in layout.canvases:
        for width, height in (canvas.source.size, *canvas.earlier, canvas.resized, canvas.frame.size):
            if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
                raise ImageError("too narrow", f"{shape.width} x {shape.height} pixels would become {width} x {height}")
    return layout


def layouts_of(plan: ImagePlan, shapes: Sequence[ImageShape | FilmShape]) -> list[ImageLayout] | None:
    """Return the layouts of pictures and films; None where all have the same views and tokens: no need to ask."""
    if plan.fixed and not any(isinstance(shape, FilmShape) for shape in shapes):
        return None
    return [plan.of(shape) for shape in shapes]


def views_of(plan: ImagePlan, layout: ImageLayout) -> float:
    """Return how many views of usual size a picture or film is worth to the tower."""
    maker: Any = plan.maker(layout)
    return float(maker.views_of(layout))


def pixels_of(plan: ImagePlan, layout: ImageLayout) -> tuple[int, ...]:
    """Return the shape of the pixels of a picture or film."""
    maker: Any = plan.maker(layout)
    found: tuple[int, ...] = maker.pixels_of(layout)
    return found


@dataclass(frozen=True)
class Arrangement:
    """Where the features of some views go among T slots."""

    features: int
    """How many features the views have."""
    index: NDArray[np.int64] | None
    """[T, K] which of them each slot is made of, -1 for the newline vector; None where they stay in their order."""
    weight: NDArray[np.float32] | None = None
    """[T, K] their weights; None for 1, with K 1."""
    grid: NDArray[np.int64] | None = None
    """[V, 3] frames, rows and columns of patches of each picture, or slice of one, where they keep sizes of their own;
    else None."""


def arrange(plan: ImagePlan, layouts: Sequence[ImageLayout]) -> Arrangement:
    """Return where the features of several pictures go, one picture after the other."""
    return joined([_arrangement(plan, layout) for layout in layouts])


@functools.lru_cache(maxsize=1024)
def _arrangement(plan: ImagePlan, layout: ImageLayout) -> Arrangement:
    import numpy as np  # noqa: PLC0415 - --help imports this module

    maker: Any = plan.maker(layout)
    found, features = maker.feature_index(layout), maker.features_of(layout)
    grid = np.array(layout.grids, np.int64) if layout.grids else None
    if found is None:
        return Arrangement(features, None, grid=grid)
    return Arrangement(features, found.index, found.weight, grid)


def joined(parts: Sequence[Arrangement]) -> Arrangement:
    """Return several arrangements as one, one after the other."""
    import numpy as np  # noqa: PLC0415 - --help imports this module

    features = sum(part.features for part in parts)
    grids = [part.grid for part in parts if part.grid is not None]
    grid = np.concatenate(grids) if grids else None
    if all(part.index is None for part in parts):
        return Arrangement(features, None, grid=grid)
    weighted = any(part.weight is not None for part in parts)
    widest = max(1 if part.index is None else part.index.shape[1] for part in parts)
    indices, weights, first = [], [], 0
    for part in parts:
        own = np.arange(part.features)[:, None] if part.index is None else part.index
        index, weight = np.zeros((len(own), widest), np.int64), np.zeros((len(own), widest), np.float32)
        index[:, : own.shape[1]] = np.where(own < 0, NEWLINE, own + first)
        weight[:, : own.shape[1]] = 1.0 if part.weight is None else part.weight
        indices.append(index)
        weights.append(weight)
        first += part.features
    return Arrangement(features, np.concatenate(indices), np.concatenate(weights) if weighted else None, grid)


def register_plan(
    name: str, plan: type[ImagePlan], build: Callable[[ModelConfig], ImagePlan], keys: Sequence[str] = ()
) -> None:
    """Add a kind of plan.

    Args:
        name: What recipes call it.
        plan: Its class.
        build: Makes the plan of a model from ``model.image`` and the other branches; a ``UserError`` of it names the
            key, the rule and the remedy.
        keys: Keys of ``model.image`` that it looks at, besides kind and resample; others are refused.

    Raises:
        UserError: The name is taken.
    """
    _KINDS.register(name, plan, build, keys)


def plan_kinds() -> dict[str, PlanKind[ImagePlan]]:
    """Return the registered kinds by name."""
    return _KINDS.all()


def plan_of(model: ModelConfig) -> ImagePlan:
    """Return the image plan of a model, with its film plan.

    Raises:
        UserError: The keys of ``model.image`` or ``model.video`` make none; the message starts with the key.
    """
    kind = _KINDS.chosen(model)
    assert kind is not None, "every kind of pictures is a plan"
    plan, films = kind.build(model), film_plan_of(model)
    return plan if films is None else dataclasses.replace(plan, films=films)


def _features_past(model: ModelConfig, plan: ImagePlan) -> Iterator[str]:
    """Check that what goes past the connector is what the language model's layers attend to."""
    (_, width), wanted = model.vision.features_past, model.language.feature_width
    if width != wanted:
        yield (
            f"model.language.cross_hidden_size: layers attend to features of {wanted or 'no'} numbers, and the tower "
            f"gives them {width or 'none'} (model.vision.high_to layers: of model.vision.high_hidden_size); make both "
            "the same, or set them to null and connector"
        )
    elif width and not model.connector.each_patch:
        yield (
            f"model.connector.preset: {model.connector.preset} makes no slot of each patch, as model.vision.high_to"
            " layers asks for; take glu or mlpNx_gelu, or set that to connector"
        )
    elif width and not (plan.joined or (plan.fixed and plan.square)):
        yield (
            f"model.image.kind: {model.image.kind} makes several views of a picture, and with model.vision.high_to"
            " layers it has one; set it to squash_pair"
        )


def image_rules(recipe: Recipe) -> Iterator[str]:
    """Check ``model.image``, and that a picture fits a sequence."""
    try:
        plan = plan_of(recipe.model)
    except UserError as error:
        yield str(error)
        return
    vision = recipe.model.vision
    if isinstance(plan, CrossPlan) != bool(recipe.model.language.cross_layers):
        yield (
            f"model.image.kind: {recipe.model.image.kind} "
            + ("makes one token of a picture" if isinstance(plan, CrossPlan) else "puts features among the tokens")
            + ", and model.language.cross_attention_layers says "
            + (
                "that they stand there; name layers"
                if isinstance(plan, CrossPlan)
                else "that layers attend to them; set it to canvas_tiles"
            )
        )
    if vision.packed and not plan.packed:
        yield (
            f"model.image.kind: the tower {vision.preset!r} takes pictures of any size as patches, and "
            f"{recipe.model.image.kind} does not make these; set it to native"
        )
    elif not vision.packed and not plan.square and not plan.joined:
        yield (
            f"model.image.kind: the views of {recipe.model.image.kind} are not square, and the tower "
            f"{vision.preset!r} takes squares only; choose another image plan"
        )
    elif not vision.packed and plan.sides != vision.sides:
        yield (
            f"model.image.kind: {recipe.model.image.kind} makes {_renderings(plan.sides)} of a picture, and the tower "
            f"{vision.preset!r} takes {_renderings(vision.sides)}; set it to "
            f"{'fit_pair, crop_squash or squash_pair' if len(vision.sides) == 2 else 'squash, pad, fit or crop'}"
        )
    yield from _features_past(recipe.model, plan)
    if len(vision.towers) > 1 and plan.films is not None:
        yield (
            f"model.video.kind: the frames of {recipe.model.video.kind} are for one tower, and {vision.preset!r} has"
            " two; set it to none"
        )
    side = 1 if plan.packed else plan.side
    if vision.deepstack and plan.newline:
        yield (
            f"model.image.kind: {recipe.model.image.kind} has a newline vector, which no level of "
            "model.vision.deepstack_layers has; choose another image plan, or set that to []"
        )
    if vision.codes is not None and plan.newline:
        yield (
            f"model.image.kind: {recipe.model.image.kind} has a newline vector, and pictures of the tower"
            f" {vision.preset!r} are codes, of which none is one; choose another image plan"
        )
    if recipe.loss.image_tokens and vision.codes is not None and not plan.fixed:
        yield (
            f"loss.image_tokens: model.image.kind {recipe.model.image.kind} makes several views of a picture, whose"
            " codes are not stored; take crop, or set it to 0"
        )
    if recipe.model.language.position_axes > 1 and vision.ungridded is not None:
        yield (
            f"model.vision.{vision.ungridded}: features stand in no grid of rows and columns, as "
            "model.language.rotary_sections asks for; leave it out"
        )
    elif recipe.model.language.position_axes > 1:
        try:
            plan.token_grids(plan.plan(side, side))
        except UserError as error:
            yield str(error)
    shapes = [(side, side), (2 * side, side), (side, 2 * side)]
    least = min(plan.plan(*shape).tokens for shape in shapes)
    needed = least + 2 + TEXT_TOKENS
    if recipe.data.sequence_length < needed:
        yield (
            f"data.sequence_length: {recipe.data.sequence_length} is too short: one image takes {least + 2} positions"
            f"{'' if plan.fixed else ' or more'}, and text must fit beside it; take at least {needed}"
        )


def _renderings(sides: Sequence[int]) -> str:
    shown = " and ".join(f"{side} x {side}" for side in sides)
    return f"{'one rendering' if len(sides) == 1 else 'renderings'} of {shown} pixels"


add_rule(image_rules)


_KINDS: PlanKinds[ImagePlan] = PlanKinds(
    "image",
    "image plan",
    tuple(
        f"megavlm.data.{module}"
        for module in ("plans_single", "plans_tiles", "plans_slices", "plans_split", "plans_native", "plans_canvas")
    ),
    common=("resample",),
)


def colour(model: ModelConfig, otherwise: str | Colour, mean: Sequence[float] | None = None) -> Colour:
    """Return the colour that ``model.image.fill`` names, or its kind's own.

    Args:
        model: the model.
        otherwise: that of its kind.
        mean: what ``mean`` stands for; None for the tower's.

    Raises:
        UserError: It is no colour.
    """
    fill = otherwise if model.image.fill is None else model.image.fill
    if fill == "mean":
        # Rounded down, as LLaVA does.
        red, green, blue = (min(max(int(value * 255), 0), 255) for value in mean or model.vision.image_mean)
        return red, green, blue
    assert not isinstance(fill, str)
    if not all(0 <= value <= 255 for value in fill):
        raise UserError(f"model.image.fill: {list(fill)} is not a colour; give red, green and blue from 0 to 255")
    return fill


def feature_side(model: ModelConfig, kind: str) -> int:
    """Return the side of the square of features that a view becomes.

    Raises:
        UserError: Tower and connector make no square with the patches' order.
    """
    side = math.isqrt(model.tokens_per_view)
    if side * side != model.tokens_per_view or not model.connector.spatial:
        raise UserError(
            f"model.image.kind: {kind} puts the features of tiles together to one picture, but the connector "
            f"{model.connector.preset!r} does not keep them where their patches are; take linear or mlp2x_gelu, or "
            "another image plan"
        )
    return side
