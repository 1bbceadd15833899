"""What a tensor-parallel rank has of tower and connector: a part of each layer, or all and a part of the pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megavlm.architectures.cost import Pictures
from megavlm.config.schema import ModelConfig
from megavlm.config.split import is_replicated, picture_owners, tensor_ranks
from megavlm.planning.layout import Layout

Seen = float | Pictures | Sequence[Sequence[int]]
"""What a tower sees of a pack: so many views of the usual size; pictures of any size, on average; or the pictures of a
pack themselves, each by its frames, rows and columns of patches."""


def share(model: ModelConfig, part: str, layout: Layout, seen: Seen) -> tuple[int, Pictures]:
    """Return over how many ranks a part's layers are cut, and what of the pictures the busiest of them runs."""
    ranks = tensor_ranks(model, part, layout.tensor)
    return ranks, _busiest(model, seen, 1 if ranks == layout.tensor else layout.tensor)


def seen_by_layers(model: ModelConfig, seen: Seen, context: int) -> Pictures:
    """Return the pictures that language layers attend to, all of them on each rank.

    Args:
        model: the model.
        seen: what the tower sees of a micro-batch, on one of the ranks that share it.
        context: so many context-parallel ranks share it.
    """
    return _busiest(model, seen, 1).times(context)


def _busiest(model: ModelConfig, seen: Seen, ranks: int) -> Pictures:
    """Return what the busiest of ``ranks`` that share out the pictures runs."""
    if isinstance(seen, float | int):
        return Pictures.alike(_most(seen, ranks), model.vision.grid)
    if isinstance(seen, Pictures):
        return seen.times(_most(seen.count, ranks) / seen.count if seen.count else 1)
    if ranks == 1 or not seen:
        return Pictures.shown(seen)
    owners = picture_owners([math.prod(grid) for grid in seen], ranks)
    each = [Pictures.shown(g for g, own in zip(seen, owners, strict=True) if own == rank) for rank in range(ranks)]
    return max(each, key=lambda one: one.patches)


def _most(number: float, ranks: int) -> float:
    """Return how many of a number of pictures the busiest rank has; a number on average may be less than one."""
    return number if ranks == 1 else min(number, math.ceil(number / ranks))


def gathered_features(model: ModelConfig, layout: Layout, views: float) -> float:
    """Return the numbers of features of ``views`` that the ranks gather behind a part that is replicated."""
    if is_replicated(model, "connector", layout.tensor):
        return views * model.tokens_per_view * (model.language.hidden_size + math.prod(model.vision.features_past))
    if is_replicated(model, "vision", layout.tensor):
        return (
            views
            * model.vision.features_per_image
            * (model.vision.feature_size + math.prod(model.vision.features_past))
        )
    return 0
