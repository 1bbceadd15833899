"""What a plan asks of layers with experts: which layers have some, and what sending tokens to them takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from megavlm.architectures.cost import layer_kinds
from megavlm.config.schema import LanguageConfig, Recipe
from megavlm.planning.gpus import COLLECTIVE_SECONDS, Gpu
from megavlm.planning.layout import GPUS_PER_NODE, Chunk, Layout

_SIZES = (1, 2, 4, 8, 16, 32, 64)


def kinds_of(recipe: Recipe, chunk: Chunk) -> list[tuple[LanguageConfig, int]]:
    """Return how many layers of each kind a chunk has."""
    kinds = layer_kinds(recipe.model.language)[chunk.begin : chunk.begin + chunk.layers]
    counts = Counter(map(id, kinds))  # a search asks often, and equal kinds are one object
    known = {id(kind): kind for kind in kinds} if len(counts) > 1 else {id(kind): kind for kind in kinds[:1]}
    return [(known[one], count) for one, count in counts.items()]


def dispatch_seconds(layout: Layout, gpu: Gpu, moved: float) -> float:
    """Return the seconds in which ranks send ``moved`` bytes each to where their tokens' experts are.

    Each sends as much to every rank that has some of the experts. Those ranks lie side by side: a node has as many of
    them as it can. Ranks that share an expert then gather what each of them got, or add up what they give.
    """
    ranks, sharing = layout.experts, layout.expert_tensor
    if not moved:
        return 0.0
    gathered = moved * (sharing - 1) / (gpu.nvlink * gpu.efficiency.nvlink) + COLLECTIVE_SECONDS if sharing > 1 else 0.0
    if ranks == 1:
        return gathered
    inside = min(ranks, max(GPUS_PER_NODE // layout.expert_tensor, 1))
    beside = moved * (inside - 1) / ranks / (gpu.nvlink * gpu.efficiency.nvlink)
    away = moved * (ranks - inside) / ranks / (gpu.network * gpu.efficiency.network)
    return gathered + beside + away + COLLECTIVE_SECONDS


def expert_layouts(recipe: Recipe, ranks: int) -> Iterator[dict[str, Any]]:
    """Yield the ``parallel`` values of experts that ``ranks`` of a stage may try.

    Each expert lies whole on one of them, or, where they are not spread, is cut by TP as other layers are.
    """
    count = getattr(recipe.model.language, "num_moe_experts", None)
    if not any(recipe.model.language.expert_layers) or count is None:
        yield {}
        return
    for size in _SIZES:
        if ranks % size == 0 and count % size == 0:
            yield {"expert_model_parallel_size": size, "expert_tensor_parallel_size": None}
