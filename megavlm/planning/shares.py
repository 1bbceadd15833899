"""What a tensor-parallel rank has of tower and connector: a part of each layer, or all and a part of the pictures."""

from __future__ import annotations

import math

from megavlm.architectures.cost import Pictures
from megavlm.config.schema import ModelConfig
from megavlm.config.split import is_replicated, tensor_ranks
from megavlm.planning.layout import Layout


def share(
    model: ModelConfig, part: str, layout: Layout, views: float, patches: float | None = None
) -> tuple[int, Pictures]:
    """Return over how many ranks a part's layers are cut, and what of ``views`` the busiest of them runs.

    Args:
        model: the recipe's ``model`` branch.
        part: vision or connector.
        layout: where it runs.
        views: so many of the usual size, or worth so many.
        patches: patches of each picture; None for those of the usual one.
    """
    ranks = tensor_ranks(model, part, layout.tensor)
    seen = views if ranks == layout.tensor else math.ceil(views / layout.tensor)
    return ranks, pictures_worth(model, seen, patches)


def pictures_worth(model: ModelConfig, views: float, patches: float | None) -> Pictures:
    """Return pictures of so many ``patches`` each that together have as many as ``views`` of usual size."""
    usual = Pictures.alike(views, model.vision.grid)
    if patches is None:
        return usual
    return Pictures(usual.patches / patches, usual.patches, usual.patches * patches)


def gathered_features(model: ModelConfig, layout: Layout, views: float) -> float:
    """Return the numbers of features of ``views`` that the ranks gather behind a part that is replicated."""
    if is_replicated(model, "connector", layout.tensor):
        return views * model.tokens_per_view * model.language.hidden_size
    if is_replicated(model, "vision", layout.tensor):
        return views * model.vision.patches_per_image * model.vision.feature_size
    return 0
