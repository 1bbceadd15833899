"""Rules of tower and connector on all ranks (``parallel.vision_placement``)."""

from __future__ import annotations

from collections.abc import Iterator

from megavlm.config.architecture import architecture_of
from megavlm.config.schema import ParallelConfig, Recipe

APART_KEYS = ("vision_balance", "vision_shards", "vision_ahead", "vision_recompute")
"""Keys of the ``parallel`` branch that only the tower on all ranks has."""
_REMARKS = {"vision_recompute": " (on the first stage model.vision.gradient_checkpointing recomputes)"}


def vision_rules(recipe: Recipe) -> Iterator[str]:
    """Yield what does not go with the placement of tower and connector."""
    parallel = recipe.parallel
    if parallel.vision_placement == "first_stage":
        for key in APART_KEYS:
            own, plain = getattr(parallel, key), getattr(ParallelConfig(), key)
            if own != plain:
                yield (
                    f"parallel.{key}: needs parallel.vision_placement all_ranks or auto; set that, or this to"
                    f" {str(plain).lower()}{_REMARKS.get(key, '')}"
                )
    if parallel.vision_ahead:
        yield from _ahead(recipe)
    if parallel.vision_placement == "all_ranks":
        yield from _all_ranks(recipe)


def _ahead(recipe: Recipe) -> Iterator[str]:
    """Yield what does not go with encoding while a pipeline runs."""
    key = "parallel.vision_ahead"
    if not (recipe.modules.vision.freeze and recipe.modules.connector.freeze):
        yield (
            f"{key}: needs modules.vision.freeze and modules.connector.freeze, as features of the next step must not"
            " depend on this one; freeze both, or set this to false"
        )
    if recipe.parallel.vision_shards == "tensor" and recipe.parallel.tensor_model_parallel_size > 1:
        yield (
            f"{key}: does not go with parallel.vision_shards tensor, whose ranks talk while they encode; set that to"
            " whole, or this to false"
        )
    if recipe.lora.dropout:
        yield f"{key}: does not go with lora.dropout, which draws numbers meanwhile; set that to 0, or this to false"


def _all_ranks(recipe: Recipe) -> Iterator[str]:
    """Yield what does not go with towers on all ranks."""
    key = "parallel.vision_placement: all_ranks"
    if recipe.model.language.feature_width:
        yield f"{key} does not go with model.language.cross_hidden_size; set it to first_stage"
    if not recipe.parallel.use_distributed_optimizer:
        yield f"{key} needs parallel.use_distributed_optimizer; set that to true, or this to first_stage"
    if recipe.engine.fp8 is not None:
        yield f"{key} does not go with engine.fp8; set that to null, or this to first_stage"
    if recipe.engine.cuda_graph_impl != "none":
        yield f"{key} does not go with engine.cuda_graph_impl; set that to none, or this to first_stage"
    for branch in ("vision", "connector"):
        architecture = architecture_of(recipe.model, branch)
        if architecture.cost is None:
            yield (
                f"{key} spreads pictures by their cost, and the {architecture.name} architecture of model.{branch} has"
                " no figures of its own; set it to first_stage"
            )
