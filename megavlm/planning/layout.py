"""How a model lies on the ranks of a pipeline: which layers in which chunk, and who stands where in the cluster."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

from megavlm.config.schema import ParallelConfig, Recipe
from megavlm.config.vision import APART_KEYS

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Chunk:
    """One model chunk: a pipeline stage, or a part of one with a virtual pipeline."""

    index: int
    """Position in the model's order."""
    layers: int
    """Language layers."""
    first: bool
    """It holds the embedding, and tower and connector where they are not apart."""
    last: bool
    """It holds the final norm and the output layer."""
    apart: bool = False
    """Tower and connector lie on all ranks (``parallel.vision_placement``), and in no chunk."""
    begin: int = 0
    """Number of its first language layer."""
    crossed: int = 0
    """Of the layers, those that attend to pictures instead of to text."""
    attending: int = 0
    """Of the layers, those that attend to pictures, instead of to text or beside it."""
    features_go_on: bool = False
    """Whether layers of it, or of later chunks, attend to pictures."""

    @property
    def encodes(self) -> bool:
        """Whether it holds tower and connector."""
        return self.first and not self.apart


@dataclass(frozen=True)
class Layout:
    """A recipe's layout on a number of GPUs."""

    tensor: int
    pipeline: int
    virtual: int | None
    data: int
    microbatches: int
    """Micro-batches of a step, per data-parallel rank."""
    sequence_parallel: bool
    chunks: tuple[Chunk, ...]
    """In the model's order."""
    apart: bool = False
    """Tower and connector lie on every rank, and each encodes its share of a step's pictures."""
    together: bool = False
    """With ``apart``: they are cut over the tensor-parallel ranks of a stage, which encode the same pictures."""
    context: int = 1
    """Ranks that share each pack (CP)."""
    experts: int = 1
    """Ranks that share out the experts of a layer (EP)."""
    expert_tensor: int = 1
    """Ranks that share each of them."""

    @property
    def expert_data(self) -> int:
        """Ranks that hold the same experts."""
        return max(self.gpus // (self.pipeline * self.experts * self.expert_tensor), 1)

    @property
    def ranks(self) -> int:
        """Ranks of a replica."""
        return self.tensor * self.context * self.pipeline

    @property
    def shards(self) -> int:
        """Ranks that hold the same weights, sum their gradients and share the optimizer: DP x CP."""
        return self.data * self.context

    @property
    def places(self) -> int:
        """What encodes pictures of its own in a replica, with ``apart``: ranks, or stages."""
        return self.pipeline if self.together else self.ranks

    @property
    def vision_data(self) -> int:
        """Ranks that hold the same of tower and connector, with ``apart``."""
        return self.gpus // (self.tensor if self.together else 1)

    @property
    def gpus(self) -> int:
        """Processes, one on each GPU."""
        return self.ranks * self.data

    def chunks_of(self, stage: int) -> tuple[Chunk, ...]:
        """Return the chunks of a pipeline stage."""
        return tuple(chunk for chunk in self.chunks if chunk.index % self.pipeline == stage)

    @property
    def layers_per_stage(self) -> tuple[int, ...]:
        """Language layers of each stage."""
        return tuple(sum(chunk.layers for chunk in self.chunks_of(stage)) for stage in range(self.pipeline))

    @property
    def pipeline_crosses_nodes(self) -> bool:
        """Whether messages between stages leave the node: Megatron-Core puts stages farthest apart."""
        return self.gpus > GPUS_PER_NODE and self.pipeline > 1

    @property
    def data_ranks_per_node(self) -> int:
        """Ranks of those that share weights in one node: these groups lie between tensor and pipeline."""
        return min(max(GPUS_PER_NODE // self.tensor, 1), self.shards)

    @property
    def context_in_node(self) -> bool:
        """Whether ranks that share a pack lie in one node: they lie next to the tensor-parallel ones."""
        return self.tensor * self.context <= GPUS_PER_NODE


def stage_layers(recipe: Recipe) -> list[int]:
    """Return the language layers of each model chunk, in the model's order."""
    parallel, layers = recipe.parallel, recipe.model.language.num_layers
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    first = parallel.num_layers_in_first_pipeline_stage
    stages = [layers // pp] * pp
    if first is not None and pp > 1:
        stages = [first, *[(layers - first) // (pp - 1)] * (pp - 1)]
    return [stage // vpp for stage in stages] * vpp


def chunks_of(recipe: Recipe) -> tuple[Chunk, ...]:
    """Return the model chunks of a checked recipe, in the model's order."""
    chunks, apart = stage_layers(recipe), recipe.parallel.vision_placement == "all_ranks"
    crossing, attending = recipe.model.language.cross_layers, recipe.model.language.attending_layers
    return tuple(
        Chunk(
            index,
            layers,
            index == 0,
            index == len(chunks) - 1,
            apart,
            begin=sum(chunks[:index]),
            crossed=sum(sum(chunks[:index]) <= one < sum(chunks[: index + 1]) for one in crossing),
            attending=sum(sum(chunks[:index]) <= one < sum(chunks[: index + 1]) for one in attending),
            features_go_on=any(one >= sum(chunks[:index]) for one in attending),
        )
        for index, layers in enumerate(chunks)
    )


def layout_of(recipe: Recipe, gpus: int, chunks: tuple[Chunk, ...] | None = None) -> Layout:
    """Return the layout of a checked recipe on ``gpus`` processes (``check_recipe`` refuses what does not divide).

    ``chunks``: those of :func:`chunks_of`, where they are known.
    """
    parallel = recipe.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    data, apart = gpus // (tp * pp * parallel.context_parallel_size), parallel.vision_placement == "all_ranks"
    return Layout(
        tensor=tp,
        pipeline=pp,
        virtual=parallel.virtual_pipeline_model_parallel_size,
        data=data,
        microbatches=recipe.training.global_batch_size // data,
        sequence_parallel=parallel.sequence_parallel,
        chunks=chunks_of(recipe) if chunks is None else chunks,
        experts=parallel.expert_model_parallel_size,
        expert_tensor=parallel.expert_tensor_ranks,
        apart=apart,
        together=apart and parallel.vision_shards == "tensor" and tp > 1,
        context=parallel.context_parallel_size,
    )


def with_parallel(recipe: Recipe, **values: Any) -> Recipe:
    """Return the recipe with other values in its ``parallel`` branch."""
    return dataclasses.replace(recipe, parallel=dataclasses.replace(recipe.parallel, **values))


def with_branch(recipe: Recipe, **branches: Any) -> Recipe:
    """Return the recipe with other branches, whose types are known: ``replace`` would check them again."""
    found = copy.copy(recipe)
    vars(found).update(branches)
    return found


def tried(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """Return :func:`with_parallel` of values that the planner made itself, ten times as fast."""
    parallel = copy.copy(recipe.parallel)
    vars(parallel).update(values)
    return with_branch(recipe, parallel=parallel)


def with_placement(recipe: Recipe, placement: str) -> Recipe:
    """Return the recipe with another ``vision_placement``, without the keys that only the tower on all ranks has."""
    plain = ParallelConfig()
    others = {key: getattr(plain, key) for key in APART_KEYS} if placement == "first_stage" else {}
    return with_parallel(recipe, vision_placement=placement, **others)
