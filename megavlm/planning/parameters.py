"""Parameters of each model chunk on one rank, counted from the recipe: the shapes that the builders make.

Every number is of one tensor-parallel rank, and in elements. ``tests/planning/test_parameters.py`` holds them
against real models.
"""

from __future__ import annotations

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
from megavlm.planning.known import Known
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
    return tuple(one for group in _chunk_groups(*_kind(recipe, layout, chunk)) for one in group)


def _kind(recipe: Recipe, layout: Layout, chunk: Chunk) -> _Kind:
    modules = recipe.modules
    learns = (not modules.vision.freeze, not modules.connector.freeze, not modules.language.freeze)
    layers = Layers(chunk.begin, chunk.layers, layout.experts, layout.expert_tensor)
    return recipe.model, recipe.lora, learns, layout.tensor, layers, chunk.first, chunk.last, chunk.encodes


def _expert_parameters(kind: LanguageConfig, learns: bool, quantised: bool, layers: Layers) -> list[ChunkParameter]:
    """Return the parameters of the experts of a layer on one rank; ``quantised``: all but biases are in 4 bits."""
    shapes = expert_parameters(kind, layers.experts, layers.expert_tensor)
    spread, matrices = layers.experts > 1, set(shapes[:2])
    known = {
        size: ChunkParameter("language", size, learns, quantised and size in matrices, spread=spread)
        for size in set(shapes)
    }
    return [known[size] for size in shapes]


def _chunk_groups(
    model: ModelConfig,
    lora: LoraConfig,
    learns: tuple[bool, bool, bool],
    tp: int,
    layers: Layers,
    first: bool,
    last: bool,
    encodes: bool,
) -> list[list[ChunkParameter]]:
    """Return the parameters of a chunk, group by group; what layers of a kind have is one list, there many times."""
    language, cost = model.language, decoder_cost(model.language)
    table = cost.vocabulary(language, tp) // tp * language.hidden_size
    found: list[list[ChunkParameter]] = [_pictures(model, learns, tp) if encodes else []]
    numbered = list(enumerate(layer_kinds(language)))[layers.first : layers.first + layers.number]
    kinds, crossed = [kind for _, kind in numbered], set(language.cross_layers)
    trained, spread = learns[2] and lora.rank is None, Layers(0, 0, layers.experts, layers.expert_tensor)
    experts = {
        id(kind): _expert_parameters(kind, trained, lora.quantize is not None, spread)
        for kind in {id(kind): kind for kind in kinds}.values()
    }
    found += [experts[id(kind)] for kind in kinds]
    if lora.rank is not None:
        own = _with_adapters(language, lora, tp, numbered, first, last)
        return [*found, list(own), list(_beside_experts(kinds, lora, spread))]
    plain: dict[tuple[int, bool], list[ChunkParameter]] = {}
    for number, kind in numbered:
        key = id(kind), number in crossed
        if key not in plain:
            shapes = cost.cross_parameters(kind, tp) if number in crossed else cost.layer_parameters(kind, tp)
            plain[key] = [ChunkParameter("language", elements, learns[2]) for elements in shapes]
        found.append(plain[key])
    shapes = [table] if first else []
    if last:
        shapes += [one.elements for one in final_parameters(language, tp)]
        # A tied output layer has a copy of its own, unless the embedding lies in the same chunk.
        if not (language.tie_word_embeddings and first):
            shapes.append(table)
    return [*found, [ChunkParameter("language", elements, learns[2]) for elements in shapes]]


def _pictures(model: ModelConfig, learns: tuple[bool, bool, bool], tp: int) -> list[ChunkParameter]:
    """Return the parameters of tower and connector."""
    found: list[ChunkParameter] = []
    for part, learning in (("vision", learns[0]), ("connector", learns[1])):
        if part == "connector" and plan_of(model).newline:
            found.append(ChunkParameter(part, model.language.hidden_size, learning))
        shapes = cost_of(model, part).parameters(own_of(model, part), tensor_ranks(model, part, tp))
        found += [ChunkParameter(part, one.elements, learning and not one.fixed) for one in shapes]
    return found


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
        norms = norm_weights(kind) if lora.train_norms else []
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


class Elements(NamedTuple):
    """How many elements some parameters have on one rank."""

    frozen: int = 0
    learning: int = 0
    end: int = 0
    """Of the buffer that holds the learning ones, before it is padded."""
    quantised: int = 0

    def buffer(self, data: int) -> int:
        """Return the elements of that buffer, which the optimizer of ``data`` ranks pads; 0 for one that does not."""
        return _padded(self.end, data) if data else self.learning


def chunk_elements(
    recipe: Recipe, layout: Layout, chunk: Chunk, known: Known | None = None, *, spread: bool = False
) -> Elements:
    """Return the elements of a chunk on one tensor-parallel rank.

    ``spread``: of experts that other ranks share, which have a buffer of their own, or of all else.
    """
    known = known or Known()
    ends = chunk.first, chunk.last, chunk.encodes
    key = layout.tensor, layout.experts, layout.expert_tensor, known.layers(recipe, chunk), *ends
    return known.once(("elements", *key), lambda: _elements(_chunk_groups(*_kind(recipe, layout, chunk))))[spread]


def _elements(groups: Sequence[Sequence[ChunkParameter]]) -> tuple[Elements, Elements]:
    """Count parameters: those that are not spread, and those that are."""
    found = [Elements(), Elements()]
    counted: dict[int, list[Elements]] = {}  # layers of a kind are one object
    for group in groups:
        own = counted.get(id(group))
        if own is None:
            own = counted[id(group)] = [_counted([one for one in group if one.spread == spread]) for spread in (0, 1)]
        found = [_behind(before, more) for before, more in zip(found, own, strict=True)]
    return found[0], found[1]


def _counted(parameters: Sequence[ChunkParameter]) -> Elements:
    sizes = [one.elements for one in parameters if one.learns]
    quantised = sum(one.elements for one in parameters if one.quantised)
    learning = sum(sizes)
    return Elements(sum(one.elements for one in parameters) - learning, learning, _end(sizes), quantised)


def _behind(before: Elements, more: Elements) -> Elements:
    """Return both together; the buffer of the second begins where that of the first ends, aligned."""
    end = _aligned(before.end) + more.end if more.end else before.end
    return Elements(
        before.frozen + more.frozen, before.learning + more.learning, end, before.quantised + more.quantised
    )


def learning_elements(
    recipe: Recipe, layout: Layout, chunk: Chunk, known: Known | None = None, *, spread: bool = False
) -> int:
    """Return the elements of a chunk that learn, on one tensor-parallel rank; ``spread``: of its experts, with EP."""
    return chunk_elements(recipe, layout, chunk, known, spread=spread).learning


def replicated_elements(recipe: Recipe, layout: Layout) -> int:
    """Return the elements on the first stage that learn and whose gradients tensor-parallel ranks add up."""
    if layout.apart:  # over all ranks of the job: ``apart_elements``
        return 0
    parts = {part for part in ("vision", "connector") if is_replicated(recipe.model, part, layout.tensor)}
    model, _, learns, *_ = _kind(recipe, layout, layout.chunks[0])
    found = _pictures(model, learns, layout.tensor) if parts else []
    return sum(parameter.elements for parameter in found if parameter.learns and parameter.module in parts)


def apart_elements(recipe: Recipe, layout: Layout, known: Known | None = None) -> tuple[int, int, int]:
    """Return what every rank has of tower and connector where they lie on all: frozen, learning, gradient buffer."""
    if not layout.apart:
        return 0, 0, 0
    ranks = layout.tensor if layout.together else 1

    def reckon() -> Elements:
        model, _, learns, *_ = _kind(recipe, layout, layout.chunks[0])
        return _counted(_pictures(model, learns, ranks))

    own = (known or Known()).once(("elements apart", ranks), reckon)
    return own.frozen, own.learning, own.buffer(layout.vision_data)


@dataclass(frozen=True)
class StaticBytes:
    """Bytes of a rank that stay allocated from the first step on."""

    weights: int
    gradients: int
    optimizer: int


def static_bytes(recipe: Recipe, layout: Layout, stage: int, known: Known | None = None) -> StaticBytes:
    """Return the bytes of weights, gradients and optimizer of a rank of ``stage``.

    As Megatron-Core keeps them: weights in the compute type; fp32 gradients of what learns, in buffers that the
    distributed optimizer pads; AdamW's two moments and, in bf16, the master weights in fp32, which the distributed
    optimizer spreads over the data- and context-parallel ranks.
    """
    known = known or Known()
    half = recipe.training.precision != "fp32"
    weight = 2 if half else 4
    cut, chunks = recipe.parallel.use_distributed_optimizer, layout.chunks_of(stage)
    ranks, expert_ranks = (layout.shards, layout.expert_data) if cut else (1, 1)
    own = [chunk_elements(recipe, layout, chunk, known) for chunk in chunks]
    experts = [chunk_elements(recipe, layout, chunk, known, spread=True) for chunk in chunks]
    buffer = sum(one.buffer(ranks if cut else 0) for one in own)
    buffer += sum(one.buffer(expert_ranks if cut else 0) for one in experts)
    frozen = sum(one.frozen for one in own) + sum(one.frozen for one in experts)
    learning, learning_experts = (sum(one.learning for one in found) for found in (own, experts))
    per_element = 12 if half else 8
    packed = sum(one.quantised for one in own) + sum(one.quantised for one in experts)
    kept, trained, apart = apart_elements(recipe, layout, known)
    return StaticBytes(
        weights=weight * (frozen - packed + buffer + kept + apart) + int(packed * NF4_BYTES),
        gradients=4 * (buffer + apart),
        optimizer=per_element * learning // ranks
        + per_element * learning_experts // expert_ranks
        + per_element * trained // layout.vision_data,
    )


def buffer_elements(sizes: Sequence[int], data: int) -> int:
    """Return the elements of a distributed optimizer's buffer that holds parameters of these sizes, in one bucket."""
    return _padded(_end(sizes), data)


def _end(sizes: Sequence[int]) -> int:
    """Return where the last parameter of a buffer ends."""
    return sum(map(_aligned, sizes[:-1])) + sizes[-1] if sizes else 0


def _aligned(end: int) -> int:
    return -(-end // _ALIGNMENT) * _ALIGNMENT


def _padded(end: int, data: int) -> int:
    multiple = math.lcm(data, _BUCKET_ALIGNMENT)
    return -(-end // multiple) * multiple
