"""Parameters of each model chunk on one rank, counted from the recipe: the shapes that the builders make.

Every number is of one tensor-parallel rank, and in elements. ``tests/planning/test_parameters.py`` holds them
against real models.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
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
from megavlm.config.schema import LanguageConfig, ModelConfig, Recipe
from megavlm.config.split import is_replicated, tensor_ranks
from megavlm.data.media import plan_of
from megavlm.planning.layout import Chunk, Layout
from megavlm.planning.reckoned import Reckoned

_ALIGNMENT = 64
"""Elements to which the distributed optimizer's buffer aligns the start of each parameter."""
NF4_BYTES = (4 + 8 / NF4_BLOCK + 32 / (NF4_BLOCK * NF4_GROUP)) / 8
"""Of a quantised weight: its code, and its share of the two levels of scales."""
_BUCKET_ALIGNMENT = 128
"""The end of a bucket is aligned to a multiple of this and of the data-parallel size."""


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
    groups = _Groups(recipe, layout).of(chunk)
    return tuple(one for group in groups for _ in range(group.times) for one in group.reckon())


class _Group(NamedTuple):
    """Parameters that stand together, and may do so in many chunks."""

    key: Hashable
    """Groups of a key are the same in all layouts of a recipe."""
    reckon: Callable[[], Iterable[ChunkParameter]]
    times: int = 1
    """They stand there so often, one behind the other."""


class _Groups:
    """The parameters of a recipe's chunks in a layout, on one rank."""

    def __init__(self, recipe: Recipe, layout: Layout) -> None:
        self._model, self._lora, self._modules = recipe.model, recipe.lora, recipe.modules
        self._tp, self._experts = layout.tensor, (layout.experts, layout.expert_tensor)
        self._trained = not recipe.modules.language.freeze

    def of(self, chunk: Chunk) -> Iterator[_Group]:
        """Yield the groups of a chunk: pictures, experts, layers, what is around them, and adapters beside experts."""
        tp, ends, experts = self._tp, (chunk.first, chunk.last), self._experts
        runs = self._runs(chunk)
        if chunk.encodes:
            yield _Group(("pictures", tp), lambda: self.pictures(tp))
        for kind, _, times in runs:
            yield _Group(("experts", id(kind), experts), functools.partial(self._expert, kind), times)
        for kind, crossed, times in runs:
            layer = functools.partial(self._layer, kind, crossed)
            yield _Group(("layer", id(kind), crossed, tp), layer, times)
        yield _Group(("ends", *ends, tp), lambda: self._ends(*ends))
        for kind, _, times in runs if self._lora.rank is not None else ():
            beside = functools.partial(self._beside_experts, kind)
            yield _Group(("beside experts", id(kind), experts), beside, times)

    def _runs(self, chunk: Chunk) -> list[tuple[LanguageConfig, bool, int]]:
        """Return the kinds of a chunk's layers, whether they attend to pictures instead of to text, and how many do."""
        language, end = self._model.language, chunk.begin + chunk.layers
        kinds = layer_kinds(language)[chunk.begin : end]
        crossed = [False] * len(kinds)
        for number in language.cross_layers:
            if chunk.begin <= number < end:
                crossed[number - chunk.begin] = True
        runs = itertools.groupby(zip(map(id, kinds), crossed, kinds, strict=True), key=operator.itemgetter(0, 1))
        return [(run[0][2], key[1], len(run)) for key, run in ((key, list(alike)) for key, alike in runs)]

    def pictures(self, tp: int) -> Iterator[ChunkParameter]:
        """Yield the parameters of tower and connector on one of ``tp`` ranks."""
        model, modules = self._model, self._modules
        for part, learns in (("vision", not modules.vision.freeze), ("connector", not modules.connector.freeze)):
            if part == "connector" and plan_of(model).newline:
                yield ChunkParameter(part, model.language.hidden_size, learns)
            for one in cost_of(model, part).parameters(own_of(model, part), tensor_ranks(model, part, tp)):
                yield ChunkParameter(part, one.elements, learns and not one.fixed)

    def _expert(self, kind: LanguageConfig) -> Iterator[ChunkParameter]:
        """Yield the parameters of the experts of a layer; those in 4 bits are all but biases."""
        shapes = expert_parameters(kind, *self._experts)
        learns, quantised = self._trained and self._lora.rank is None, self._lora.quantize is not None
        spread, matrices = self._experts[0] > 1, set(shapes[:2])
        known = {
            size: ChunkParameter("language", size, learns, quantised and size in matrices, spread=spread)
            for size in set(shapes)
        }
        yield from (known[size] for size in shapes)

    def _beside_experts(self, kind: LanguageConfig) -> Iterator[ChunkParameter]:
        """Yield the adapters of a layer's experts."""
        for elements in expert_adapter_parameters(kind, self._lora, *self._experts):
            yield ChunkParameter("language", elements, True, spread=self._experts[0] > 1)

    def _layer(self, kind: LanguageConfig, crossed: bool) -> Iterator[ChunkParameter]:
        """Yield the parameters of a layer; adapters learn, and of the others what the recipe says."""
        cost, lora, tp = decoder_cost(kind), self._lora, self._tp
        shapes = cost.cross_parameters(kind, tp) if crossed else cost.layer_parameters(kind, tp)
        if lora.rank is None:
            yield from (ChunkParameter("language", elements, self._trained) for elements in shapes)
            return
        linears = cost.cross_linear_parameters(kind, tp) if crossed else cost.linear_parameters(kind, tp)
        norms = norm_weights(kind, tp) if lora.train_norms else []
        for elements in shapes:
            if elements in norms:
                norms.remove(elements)
                yield ChunkParameter("language", elements, True)
                continue
            yield ChunkParameter("language", elements, False, lora.quantize is not None and elements in linears)
        adapters = cost.cross_adapter_parameters if crossed else cost.adapter_parameters
        yield from (ChunkParameter("language", elements, True) for elements in adapters(kind, lora, tp))

    def _ends(self, first: bool, last: bool) -> Iterator[ChunkParameter]:
        """Yield what the first and the last chunk have beside layers."""
        language, lora, tp, adapted = self._model.language, self._lora, self._tp, self._lora.rank is not None
        table = decoder_cost(language).vocabulary(language, tp) // tp * language.hidden_size
        if first:
            yield ChunkParameter("language", table, lora.train_embeddings if adapted else self._trained)
        if not last:
            return
        for number, one in enumerate(final_parameters(language, tp)):  # first the last norm's weight
            beside = (lora.train_head and one.head) or (lora.train_norms and number == 0)
            yield ChunkParameter("language", one.elements, beside if adapted else self._trained)
        # A tied output layer has a copy of its own, unless the embedding lies in the same chunk.
        if not (language.tie_word_embeddings and first):
            yield ChunkParameter("language", table, lora.train_head if adapted else self._trained)


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

    def then(self, more: Elements, times: int) -> Elements:
        """Return these and behind them ``more``, so many times; in the buffer each begins aligned."""
        end = _aligned(self.end) + (times - 1) * _aligned(more.end) + more.end if more.end else self.end
        learning, quantised = self.learning + times * more.learning, self.quantised + times * more.quantised
        return Elements(self.frozen + times * more.frozen, learning, end, quantised)


def chunk_elements(
    recipe: Recipe, layout: Layout, chunk: Chunk, known: Reckoned | None = None, *, spread: bool = False
) -> Elements:
    """Return the elements of a chunk on one tensor-parallel rank.

    ``spread``: of experts that other ranks share, which have a buffer of their own, or of all else.
    """
    known = known or Reckoned()
    ends = chunk.first, chunk.last, chunk.encodes
    key = layout.tensor, layout.experts, layout.expert_tensor, known.layers(recipe, chunk), *ends
    return known.once(("elements", *key), lambda: _elements(_Groups(recipe, layout).of(chunk), known))[spread]


def _elements(groups: Iterable[_Group], known: Reckoned) -> tuple[Elements, Elements]:
    """Count parameters: those that are not spread, and those that are."""
    found = Elements(), Elements()
    for group in groups:

        def counted(group: _Group = group) -> tuple[Elements, Elements]:
            all_of_it = list(group.reckon())
            return _counted(one for one in all_of_it if not one.spread), _counted(
                one for one in all_of_it if one.spread
            )

        own = known.once(("elements of", group.key), counted)
        found = found[0].then(own[0], group.times), found[1].then(own[1], group.times)
    return found


def _counted(parameters: Iterable[ChunkParameter]) -> Elements:
    all_of_them = list(parameters)
    sizes = [one.elements for one in all_of_them if one.learns]
    quantised = sum(one.elements for one in all_of_them if one.quantised)
    return Elements(sum(one.elements for one in all_of_them) - sum(sizes), sum(sizes), _end(sizes), quantised)


def learning_elements(
    recipe: Recipe, layout: Layout, chunk: Chunk, known: Reckoned | None = None, *, spread: bool = False
) -> int:
    """Return the elements of a chunk that learn, on one tensor-parallel rank; ``spread``: of its experts, with EP."""
    return chunk_elements(recipe, layout, chunk, known, spread=spread).learning


def replicated_elements(recipe: Recipe, layout: Layout) -> int:
    """Return the elements on the first stage that learn and whose gradients tensor-parallel ranks add up."""
    if layout.apart:  # over all ranks of the job: ``apart_elements``
        return 0
    parts = {part for part in ("vision", "connector") if is_replicated(recipe.model, part, layout.tensor)}
    found = _Groups(recipe, layout).pictures(layout.tensor) if parts else ()
    return sum(parameter.elements for parameter in found if parameter.learns and parameter.module in parts)


def apart_elements(recipe: Recipe, layout: Layout, known: Reckoned | None = None) -> tuple[int, int, int]:
    """Return what every rank has of tower and connector where they lie on all: frozen, learning, gradient buffer."""
    if not layout.apart:
        return 0, 0, 0
    ranks = layout.tensor if layout.together else 1

    own = (known or Reckoned()).once(
        ("elements apart", ranks), lambda: _counted(_Groups(recipe, layout).pictures(ranks))
    )
    return own.frozen, own.learning, own.buffer(layout.vision_data)


@dataclass(frozen=True)
class StaticBytes:
    """Bytes of a rank that stay allocated from the first step on."""

    weights: int
    gradients: int
    optimizer: int


def static_bytes(recipe: Recipe, layout: Layout, stage: int, known: Reckoned | None = None) -> StaticBytes:
    """Return the bytes of weights, gradients and optimizer of a rank of ``stage``.

    As Megatron-Core keeps them: weights in the compute type; fp32 gradients of what learns, in buffers that the
    distributed optimizer pads; AdamW's two moments and, in bf16, the master weights in fp32, which the distributed
    optimizer spreads over the data- and context-parallel ranks.
    """
    known = known or Reckoned()
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
