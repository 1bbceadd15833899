"""What a tensor-parallel rank has of tower and connector: a part of each layer, or all and a part of the pictures."""

from __future__ import annotations

import math

from megavlm.config.schema import ModelConfig, Recipe
from megavlm.config.split import is_replicated, tensor_ranks
from megavlm.planning.layout import Layout


def share(model: ModelConfig, part: str, layout: Layout, images: float) -> tuple[int, float]:
    """Return over how many ranks a part's layers are cut, and how many of ``images`` the busiest rank runs."""
    ranks = tensor_ranks(model, part, layout.tensor)
    return ranks, images if ranks == layout.tensor else math.ceil(images / layout.tensor)


def gathered_features(recipe: Recipe, layout: Layout, images: float) -> float:
    """Return the numbers of features of ``images`` that the ranks gather behind a part that is replicated."""
    model = recipe.model
    if is_replicated(model, "connector", layout.tensor):
        return images * model.tokens_per_image * model.language.hidden_size
    if is_replicated(model, "vision", layout.tensor):
        return images * model.vision.patches_per_image * model.vision.hidden_size
    return 0
