"""Rules of experts that other branches of a recipe than the model's have a part in."""

from __future__ import annotations

from collections.abc import Iterator

from megavlm.config.lora import EXPERT_LINEARS, targets_of
from megavlm.config.schema import ParallelConfig, Recipe

EP = "parallel.expert_model_parallel_size"
ETP = "parallel.expert_tensor_parallel_size"


def experts_span_replicas(parallel: ParallelConfig) -> bool:
    """Whether ranks of several replicas share out the experts, so that all must run the same forward passes.

    Those that do are side by side: of 3 ranks of a stage, the last has experts together with the next replica's first.
    """
    ranks = parallel.expert_model_parallel_size * parallel.expert_tensor_ranks
    return parallel.expert_model_parallel_size > 1 and _ranks_of_a_stage(parallel) % ranks > 0


def _ranks_of_a_stage(parallel: ParallelConfig) -> int:
    """Return the ranks of a replica that run one pipeline stage."""
    return parallel.tensor_model_parallel_size * parallel.context_parallel_size


def expert_rules(recipe: Recipe) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    parallel, engine = recipe.parallel, recipe.engine
    if not any(recipe.model.language.expert_layers):
        for key, value, plain in (
            (EP, parallel.expert_model_parallel_size, 1), (ETP, parallel.expert_tensor_parallel_size, None),
        ):  # fmt: skip
            if value != plain:
                yield f"{key}: the language model has no experts; set it to {'null' if plain is None else plain}"
        return
    if engine.fp8 is not None:
        yield "engine.fp8: layers with experts are not proven in FP8; set it to null"
    if engine.cuda_graph_impl != "none":
        yield "engine.cuda_graph_impl: how many tokens an expert gets changes with each step; set it to none"
    if parallel.vision_placement == "all_ranks":
        yield "parallel.vision_placement: all_ranks is not proven with experts; set it to first_stage"
    yield from _adapters(recipe)


def _adapters(recipe: Recipe) -> Iterator[str]:
    """Check which adapters experts may have, and where they lie then."""
    lora, parallel, language = recipe.lora, recipe.parallel, recipe.model.language
    if lora.rank is None:
        return
    tp, shards = parallel.tensor_model_parallel_size, parallel.expert_tensor_ranks
    if shards not in (1, tp) and any(target.linear in EXPERT_LINEARS for target in targets_of(lora, language)):
        yield (
            f"{ETP}: {shards} ranks share an expert, which with adapters one rank has, or the"
            f" {tp} of parallel.tensor_model_parallel_size; set it to 1{f' or {tp}' if tp > 1 else ''}"
        )


def expert_world(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Yield what the number of processes has against the layout of experts."""
    parallel = recipe.parallel
    ep, shards, pp = (
        parallel.expert_model_parallel_size, parallel.expert_tensor_ranks, parallel.pipeline_model_parallel_size,
    )  # fmt: skip
    if world_size % (ep * shards * pp):
        yield (
            f"{EP}: {ep} x ranks of an expert ({shards}) x pipeline stages ({pp}) = {ep * shards * pp} does not divide"
            f" the {world_size} processes of this job; change the layout, or the number of processes"
        )
