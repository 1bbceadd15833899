"""Parameters of each model chunk on one rank, counted from the recipe: the shapes that the builders make.

Every number is of one tensor-parallel rank, and in elements. ``tests/planning/test_parameters.py`` holds them
against real models.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megavlm.architectures.cost import (
    cost_of,
    decoder_cost,
    expert_adapter_parameters,
    expert_parameters,
    final_parameters,
    layer_kinds,
    norm_weights,
)
from megavlm.config.architecture import BRANCHES, own_of
from megavlm.config.lora import NF4_BLOCK, NF4_GROUP
from megavlm.config.schema import LanguageConfig, LoraConfig, ModelConfig, Recipe
from megavlm.config.split import is_replicated, tensor_ranks
from megavlm.data.media import plan_of
from megavlm.planning.layout import Chunk, Layout

_ALIGNMENT = 64
"""Elements to which the distributed optimizer's buffer aligns the start of each parameter."""
NF4_BYTES = (4 + 8 / NF4_BLOCK + 32 / (NF4_BLOCK * NF4_GROUP)) / 8
"""Of a quantised weight: its code, and its share of the two levels of scales."""
_BUCKET_ALIGNMENT = 128
"""The end of a bucket is aligned to a multiple of this and of the data-parallel size."""


_Kind = tuple[ModelConfig, LoraConfig, tuple[bool, bool, bool], int, "Layers", bool, bool, bool]
"""What a chunk's parameters depend on: model, what learns, TP, layers, first, last, whether it encodes."""


class Layers(NamedTuple):
    """The language layers of a chunk, and over how many ranks their experts lie."""

    first: int = 0
    number: int = 0
    experts: int = 1
    expert_tensor: int = 1


@dataclass(frozen=True)
class ChunkParameter:
    """One parameter of a chunk."""

    module: str
    """vision, connector or language."""
    elements: int
    learns: bool
    quantised: bool = False
    """Kept in 4 bits, with two levels of scales."""
    spread: bool = False
    """An expert's, with expert parallelism: other ranks hold the same of it than of the rest."""


def check_costs(model: ModelConfig) -> None:
    """Check that the planner knows the parts of this model.

    Raises:
        NoCostError: an architecture has no cost.
    """
    for branch in BRANCHES:
        cost_of(model, branch)


def chunk_parameters(recipe: Recipe, layout: Layout, chunk: Chunk) -> tuple[ChunkParameter, ...]:
    """Return the parameters of one chunk on one tensor-parallel rank."""
    return _chunk_parameters(*_kind(recipe, layout, chunk))


def _kind(recipe: Recipe, layout: Layout, chunk: Chunk) -> _Kind:
    modules = recipe.modules
    learns = (not modules.vision.freeze, not modules.connector.freeze, not modules.language.freeze)
    layers = Layers(chunk.begin, chunk.layers, layout.experts, layout.expert_tensor)
    return recipe.model, recipe.lora, learns, layout.tensor, layers, chunk.first, chunk.last, chunk.encodes


@functools.lru_cache(maxsize=64)
def _expert_parameters(
    kind: LanguageConfig, *, learns: bool, quantised: bool, layers: Layers
) -> tuple[ChunkParameter, ...]:
    """Return the parameters of the experts of a layer on one rank; ``quantised``: all but biases are in 4 bits."""
    shapes = expert_parameters(kind, layers.experts, layers.expert_tensor)
    spread, matrices = layers.experts > 1, set(shapes[:2])
    known = {
        size: ChunkParameter("language", size, learns, quantised and size in matrices, spread=spread)
        for size in set(shapes)
    }
    return tuple(known[size] for size in shapes)


# A search asks for the same chunks over and over; those of a hundred experts a layer are long.
@functools.lru_cache(maxsize=256)
def _chunk_parameters(
    model: ModelConfig,
    lora: LoraConfig,
    learns: tuple[bool, bool, bool],
    tp: int,
    layers: Layers,
    first: bool,
    last: bool,
    encodes: bool,
) -> tuple[ChunkParameter, ...]:
    language, cost = model.language, decoder_cost(model.language)
    table = cost.vocabulary(language, tp) // tp * language.hidden_size
    found: list[ChunkParameter] = []
    if encodes:
        for part, learning in (("vision", learns[0]), ("connector", learns[1])):
            if part == "connector" and plan_of(model).newline:
                found.append(ChunkParameter(part, language.hidden_size, learning))
            own = own_of(model, part)
            shapes = cost_of(model, part).parameters(own, tensor_ranks(model, part, tp))
            found += [ChunkParameter(part, one.elements, learning and not one.fixed) for one in shapes]
    numbered = list(enumerate(layer_kinds(language)))[layers.first : layers.first + layers.number]
    kinds, crossed = [kind for _, kind in numbered], set(language.cross_layers)
    trained, spread = learns[2] and lora.rank is None, Layers(0, 0, layers.experts, layers.expert_tensor)
    found += [
        one
        for kind in kinds
        for one in _expert_parameters(kind, learns=trained, quantised=lora.quantize is not None, layers=spread)
    ]
    shapes = [
        one
        for number, kind in numbered
        for one in (cost.cross_parameters(kind, tp) if number in crossed else cost.layer_parameters(kind, tp))
    ]
    if first:
        shapes.append(table)
    if last:
        shapes += [one.elements for one in final_parameters(language, tp)]
        # A tied output layer has a copy of its own, unless the embedding lies in the same chunk.
        if not (language.tie_word_embeddings and first):
            shapes.append(table)
    if lora.rank is None:
        return (*found, *(ChunkParameter("language", elements, learns[2]) for elements in shapes))
    own = _with_adapters(language, lora, tp, numbered, first, last)
    return (*found, *own, *_beside_experts(kinds, lora, spread))


def _beside_experts(kinds: Sequence[LanguageConfig], lora: LoraConfig, layers: Layers) -> Iterator[ChunkParameter]:
    """Yield the adapters of a chunk's experts."""
    for kind in kinds:
        for elements in expert_adapter_parameters(kind, lora, layers.experts, layers.expert_tensor):
            yield ChunkParameter("language", elements, True, spread=layers.experts > 1)


def _with_adapters(
    language: LanguageConfig,
    lora: LoraConfig,
    tp: int,
    numbered: Sequence[tuple[int, LanguageConfig]],
    first: bool,
    last: bool,
) -> Iterator[ChunkParameter]:
    """Yield the language model's parameters of a chunk: adapters learn, and of the others what the recipe says.

    ``numbered``: its layers with their numbers in the whole model, each as if all were of its kind.
    """
    cost = decoder_cost(language)
    table, crossed = cost.vocabulary(language, tp) // tp * language.hidden_size, set(language.cross_layers)
    for number, kind in numbered:
        if number in crossed:
            own, beside = cost.cross_parameters(kind, tp), cost.cross_adapter_parameters(kind, lora, tp)
            linears = cost.cross_linear_parameters(kind, tp)
        else:
            own, beside = cost.layer_parameters(kind, tp), cost.adapter_parameters(kind, lora, tp)
            linears = cost.linear_parameters(kind, tp)
        norms = norm_weights(kind, tp) if lora.train_norms else []
        for elements in own:
            if elements in norms:
                norms.remove(elements)
                yield ChunkParameter("language", elements, True)
                continue
            yield ChunkParameter("language", elements, False, lora.quantize is not None and elements in linears)
        for elements in beside:
            yield ChunkParameter("language", elements, True)
    if first:
        yield ChunkParameter("language", table, lora.train_embeddings)
    if last:
        for number, one in enumerate(final_parameters(language, tp)):  # first the last norm's weight
            learns = (lora.train_head and one.head) or (lora.train_norms and number == 0)
            yield ChunkParameter("language", one.elements, learns)
        if not (language.tie_word_embeddings and first):
            yield ChunkParameter("language", table, lora.train_head)


@functools.lru_cache(maxsize=4096)
def _elements(kind: _Kind, data: int, *, spread: bool = False) -> tuple[int, int, int]:
    """Return frozen elements, learning ones, and those of the buffer that holds the learning ones.

    ``data`` is the data-parallel size for the distributed optimizer's padding, or 0 for none. ``spread``: of experts
    that other ranks share, which have a buffer of their own, or of all else.
    """
    parameters = [parameter for parameter in _chunk_parameters(*kind) if parameter.spread == spread]
    sizes = [parameter.elements for parameter in parameters if parameter.learns]
    learning = sum(sizes)
    frozen = sum(parameter.elements for parameter in parameters) - learning
    return frozen, learning, buffer_elements(sizes, data) if data else learning


def learning_elements(recipe: Recipe, layout: Layout, chunk: Chunk, *, spread: bool = False) -> int:
    """Return the elements of a chunk that learn, on one tensor-parallel rank; ``spread``: of its experts, with EP."""
    return _elements(_kind(recipe, layout, chunk), 0, spread=spread)[1]


def replicated_elements(recipe: Recipe, layout: Layout) -> int:
    """Return the elements on the first stage that learn and whose gradients tensor-parallel ranks add up."""
    if layout.apart:  # over all ranks of the job: ``apart_elements``
        return 0
    parts = {part for part in ("vision", "connector") if is_replicated(recipe.model, part, layout.tensor)}
    found = chunk_parameters(recipe, layout, layout.chunks[0]) if parts else ()
    return sum(parameter.elements for parameter in found if parameter.learns and parameter.module in parts)


def apart_elements(recipe: Recipe, layout: Layout) -> tuple[int, int, int]:
    """Return what every rank has of tower and connector where they lie on all: frozen, learning, gradient buffer."""
    if not layout.apart:
        return 0, 0, 0
    model, _, learns, *_ = _kind(recipe, layout, layout.chunks[0])
    whole = _chunk_parameters(
        model, LoraConfig(), learns, layout.tensor if layout.together else 1, Layers(), True, False, True
    )
    found = [parameter for parameter in whole if parameter.module != "language"]
    sizes = [parameter.elements for parameter in found if parameter.learns]
    frozen = sum(parameter.elements for parameter in found) - sum(sizes)
    return frozen, sum(sizes), buffer_elements(sizes, layout.vision_data) if sizes else 0


@dataclass(frozen=True)
class StaticBytes:
    """Bytes of a rank that stay allocated from the first step on."""

    weights: int
    gradients: int
    optimizer: int


def static_bytes(recipe: Recipe, layout: Layout, stage: int) -> StaticBytes:
    """Return the bytes of weights, gradients and optimizer of a rank of ``stage``.

    As Megatron-Core keeps them: weights in the compute type; fp32 gradients of what learns, in buffers that the
    distributed optimizer pads; AdamW's two moments and, in bf16, the master weights in fp32, which the distributed
    optimizer spreads over the data- and context-parallel ranks.
    """
    parallel = recipe.parallel
    half = recipe.training.precision != "fp32"
    weight = 2 if half else 4
    ranks = layout.shards if parallel.use_distributed_optimizer else 1
    padded_for = layout.shards if parallel.use_distributed_optimizer else 0
    chunks = [_elements(_kind(recipe, layout, chunk), padded_for) for chunk in layout.chunks_of(stage)]
    frozen, learning, buffer = (sum(column) for column in zip(*chunks, strict=True))
    expert_ranks = layout.expert_data if parallel.use_distributed_optimizer else 1
    experts = [
        _elements(_kind(recipe, layout, chunk), padded_for and expert_ranks, spread=True)
        for chunk in layout.chunks_of(stage)
    ]
    frozen_experts, learning_experts, expert_buffer = (sum(column) for column in zip(*experts, strict=True))
    frozen, buffer = frozen + frozen_experts, buffer + expert_buffer
    per_element = 12 if half else 8
    packed = 0
    if recipe.lora.quantize is not None:
        packed = sum(
            parameter.elements
            for chunk in layout.chunks_of(stage)
            for parameter in chunk_parameters(recipe, layout, chunk)
            if parameter.quantised
        )
    kept, trained, own = apart_elements(recipe, layout)
    return StaticBytes(
        weights=weight * (frozen - packed + buffer + kept + own) + int(packed * NF4_BYTES),
        gradients=4 * (buffer + own),
        optimizer=per_element * learning // ranks
        + per_element * learning_experts // expert_ranks
        + per_element * trained // layout.vision_data,
    )


def buffer_elements(sizes: list[int], data: int) -> int:
    """Return the elements of a distributed optimizer's buffer that holds parameters of these sizes, in one bucket."""
    end = 0
    for size in sizes:
        end = -(-end // _ALIGNMENT) * _ALIGNMENT + size
    multiple = math.lcm(data, _BUCKET_ALIGNMENT)
    return -(-end // multiple) * multiple
