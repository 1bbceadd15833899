"""What a micro-batch is assumed to hold: how many images and samples, and how long these are."""

from __future__ import annotations

from dataclasses import dataclass

from megavlm.config.checks import TEXT_TOKENS
from megavlm.config.errors import RecipeError
from megavlm.config.schema import Recipe

TEXT_PER_IMAGE = 128
"""Tokens of text that are assumed to go with an image."""


@dataclass(frozen=True)
class Workload:
    """One pack, on average, and the heaviest one."""

    tokens: int
    """Positions of a pack."""
    images: float
    """Images of a pack on average: what time is reckoned with."""
    most_images: int
    """Images of the heaviest pack: what memory is reckoned with."""
    samples: float
    """Samples of a pack, of equal length."""

    @property
    def squared_lengths(self) -> float:
        """Sum of the squares of the samples' lengths."""
        return self.tokens * self.tokens / self.samples


def assume_workload(
    recipe: Recipe,
    images_per_pack: float | None = None,
    samples_per_pack: float | None = None,
    most_images: int | None = None,
) -> Workload:
    """Return the workload of a recipe, with assumptions where nothing is given.

    Args:
        recipe: the recipe.
        images_per_pack: images of a pack on average; None takes one for every ``tokens_per_image`` + 2 +
            ``TEXT_PER_IMAGE`` tokens.
        samples_per_pack: samples of a pack; None takes one per image, and at least one.
        most_images: images of the heaviest pack; None takes as many as fit.

    Raises:
        RecipeError: more images than a pack can hold, or a number below what makes sense.
    """
    tokens = recipe.data.sequence_length
    slot = recipe.model.tokens_per_image + 2
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
    most = fitting if most_images is None else most_images
    return Workload(tokens=tokens, images=float(images), most_images=most, samples=float(samples))
