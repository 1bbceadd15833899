"""What a micro-batch is assumed to hold: how many images and samples, and how long these are."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megavlm.architectures.cost import Pictures
from megavlm.config.checks import TEXT_TOKENS
from megavlm.config.errors import RecipeError
from megavlm.config.schema import Recipe
from megavlm.data.image_header import ImageError, check_size
from megavlm.data.media import ImageLayout, ImagePlan, plan_of

TEXT_PER_IMAGE = 128
"""Tokens of text that are assumed to go with an image."""


PICTURE = (1024, 768)
"""Width and height of the picture that is assumed where tokens and views depend on it."""

_AREAS = (1, 4, 16, 64)
_RATIOS = tuple(1.25**step for step in range(-16, 17))


@dataclass(frozen=True)
class Workload:
    """One pack, on average, and the heaviest one."""

    tokens: int
    """Positions of a pack."""
    images: float
    """Images of a pack on average."""
    views: float
    """Views of these images, which the tower sees: what time is reckoned with."""
    most_views: int
    """Views of the heaviest pack: what memory is reckoned with."""
    samples: float
    """Samples of a pack, of equal length."""
    pictures: Pictures | None = None
    """The images of an average pack where they keep sizes of their own: attention goes by the square of each."""

    @property
    def seen(self) -> float | Pictures:
        """What the tower sees of a pack on average."""
        return self.views if self.pictures is None else self.pictures

    def of_views(self, views: float) -> Workload:
        """Return the workload with so many views instead."""
        pictures = None if self.pictures is None else self.pictures.times(views / self.views if self.views else 0)
        return replace(self, views=views, pictures=pictures)

    def of_rank(self, context: int) -> Workload:
        """Return what one of so many context-parallel ranks has of a pack.

        Samples are filled up by half of 2 x CP - 1 positions on average; pictures are shared out whole.
        """
        if context == 1:
            return self
        views = self.of_views(min(self.views, math.ceil(self.views / context)))
        return replace(
            views,
            tokens=math.ceil((self.tokens + self.samples * (context - 0.5)) / context),
            most_views=math.ceil(self.most_views / context),
            samples=self.samples / context,  # as long as they are, and each rank has a part of all of them
        )

    @property
    def squared_lengths(self) -> float:
        """Sum of the squares of the samples' lengths."""
        return self.tokens * self.tokens / self.samples


def assume_workload(
    recipe: Recipe,
    images_per_pack: float | None = None,
    samples_per_pack: float | None = None,
    most_images: int | None = None,
    picture: tuple[int, int] = PICTURE,
) -> Workload:
    """Return the workload of a recipe, with assumptions where nothing is given.

    Args:
        recipe: the recipe.
        images_per_pack: images of a pack on average; None takes one for every ``slot`` of tokens (those of an image, 2
            around it, ``TEXT_PER_IMAGE``).
        samples_per_pack: samples of a pack; None takes one per image, and at least one.
        most_images: images of the heaviest pack; None takes as many as fit, of those that have most views for their
            tokens.
        picture: width and height of the average picture, for plans whose tokens depend on it.

    Raises:
        RecipeError: more images than a pack can hold, or a number below what makes sense.
    """
    tokens, plan = recipe.data.sequence_length, plan_of(recipe.model)
    try:
        check_size(*picture)
        typical = plan.plan(*picture)
    except ImageError as error:
        raise RecipeError(f"--picture-size: {error}; give another") from None
    slot = typical.tokens + 2
    fitting = max(tokens // (slot + TEXT_TOKENS), 1)
    images = images_per_pack
    if images is None:
        images = min(max(tokens // (slot + TEXT_PER_IMAGE), 1), fitting)
        if recipe.data.packing == "none":
            images = 1
    if not 0 <= images <= fitting:
        raise RecipeError(f"--images-per-pack: {images:g} is not between 0 and the {fitting} that fit; correct it")
    samples = max(images, 1.0) if samples_per_pack is None else samples_per_pack
    if not 1 <= samples <= tokens:
        raise RecipeError(f"--samples-per-pack: {samples:g} is not between 1 and {tokens}; correct it")
    if recipe.data.packing == "none":
        fitting = max(round(images), 1)
    heaviest = [
        (plan.views_of(one), max(tokens // (one.tokens + 2 + TEXT_TOKENS), 1)) for one in _layouts(plan, typical)
    ]
    if plan.packed:  # a picture is as large as its budget, and the pack, allow
        room = max(tokens - 2 - TEXT_TOKENS, 1) / plan.tokens_per_view
        heaviest = [(min(views, room), count) for views, count in heaviest]
        heaviest.append((room, 1))
    if most_images is not None or recipe.data.packing == "none":
        most = max(views for views, _ in heaviest) * (fitting if most_images is None else most_images)
    else:
        most = max(views * count for views, count in heaviest)
    return Workload(
        tokens=tokens,
        images=float(images),
        views=float(images) * plan.views_of(typical),
        most_views=math.ceil(most),
        samples=float(samples),
        pictures=Pictures.shown(typical.grids).times(images) if typical.grids else None,
    )


def _layouts(plan: ImagePlan, typical: ImageLayout) -> list[ImageLayout]:
    """Return layouts of pictures of many sizes and proportions."""
    if plan.fixed:
        return [typical]
    found = [typical]
    for area in _AREAS:
        for ratio in _RATIOS:
            side = plan.side * math.sqrt(area)
            found.append(plan.plan(max(1, round(side * math.sqrt(ratio))), max(1, round(side / math.sqrt(ratio)))))
    return found
