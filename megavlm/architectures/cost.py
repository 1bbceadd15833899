"""What the planner, MFU and the order of a step's packs ask an architecture: its cost. Imports no torch.

A cost is a module (``cost.py`` of the architecture's folder) with the functions of :class:`TowerCost`,
:class:`ConnectorCost` or :class:`DecoderCost`. An architecture without one is refused where a cost is needed, never
guessed. Every number is of one tensor-parallel rank where ``tensor`` (their number) is an argument, else of all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from megavlm.config.architecture import BRANCHES, architecture_of, load
from megavlm.config.errors import UserError
from megavlm.config.schema import LanguageConfig, LoraConfig, ModelConfig


@functools.lru_cache(maxsize=256)
def layer_kinds(language: LanguageConfig) -> tuple[LanguageConfig, ...]:
    """Return for each layer the language model as it were if all layers were of that one's kind.

    Of such a one ``layer_*`` of its cost tell; equal layers have equal ones.
    """
    experts = language.expert_layers
    if not any(experts):
        return (language,) * language.num_layers
    with_experts = replace(language, moe_layer_freq=1)  # type: ignore[call-arg]
    without = with_experts if all(experts) else replace(language, num_moe_experts=None)  # type: ignore[call-arg]
    return tuple(with_experts if here else without for here in experts)


def expert_parameters(language: LanguageConfig, experts: int, tensor: int) -> list[int]:
    """Return the elements of each parameter of the experts of one layer on one rank.

    A cost has ``expert_parameters`` of these arguments where layers have experts: ``experts`` ranks share them out, and
    ``tensor`` each of them. They are not among its ``layer_parameters``.
    """
    own = getattr(decoder_cost(language), "expert_parameters", None)
    return [] if own is None else list(own(language, experts, tensor))


def expert_adapter_parameters(language: LanguageConfig, lora: LoraConfig, experts: int, tensor: int) -> list[int]:
    """Return the elements of each adapter parameter of the experts of one layer on one rank.

    A cost has a function of this name where ``expert_parameters`` may have adapters beside them.
    """
    own = getattr(decoder_cost(language), "expert_adapter_parameters", None)
    return [] if own is None else list(own(language, lora, experts, tensor))


def adapter_products(language: LanguageConfig, lora: LoraConfig, tensor: int = 1) -> list[int]:
    """Return the elements of the adapters that each token is multiplied by in one layer, on one rank.

    Of experts those that a token is sent to, shared out over the tensor-parallel ranks, as its copies are. A cost has
    an ``adapter_products`` of its own where not all of ``adapter_parameters`` are.
    """
    cost = decoder_cost(language)
    found = list(getattr(cost, "adapter_products", cost.adapter_parameters)(language, lora, tensor))
    count = getattr(language, "num_moe_experts", None)
    if count is None:
        return found
    each = expert_adapter_parameters(language, lora, count, 1)
    return [*found, *(elements * language.moe_router_topk // tensor for elements in each)]


class NoCostError(UserError):
    """An architecture has no cost, and something needs it."""


@dataclass(frozen=True)
class Kernels:
    """What the layers are made of."""

    fused: bool
    """Transformer Engine's layers; False for plain torch."""
    number_bytes: int
    """Bytes of an activation: 2 in bf16, 4 in fp32."""
    fp8: bool = False
    """The language model's linear layers multiply in FP8, and keep their inputs so."""


@dataclass(frozen=True)
class Pictures:
    """What a tower encodes: sums over pictures, or over their tiles. Averages may be broken numbers."""

    count: float
    patches: float
    """Features that the tower makes of them."""
    squared: float
    """Sum of the squares of each picture's patches, as attention asks."""

    @staticmethod
    def alike(count: float, grid: tuple[int, int]) -> Pictures:
        """Return ``count`` pictures of so many rows and columns of patches."""
        patches = grid[0] * grid[1]
        return Pictures(count, count * patches, count * patches**2)

    @staticmethod
    def shown(grids: Iterable[Sequence[int]]) -> Pictures:
        """Return pictures of any size, each of so many frames, rows and columns of patches.

        A tower sees each frame by itself: frames of a film do not attend to each other.
        """
        count = patches = squared = 0
        for frames, rows, columns in grids:
            count += frames
            patches += frames * rows * columns
            squared += frames * (rows * columns) ** 2
        return Pictures(count, patches, squared)

    def times(self, number: float) -> Pictures:
        """Return so many times these pictures."""
        return Pictures(number * self.count, number * self.patches, number * self.squared)


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a forward pass, on all ranks together; a multiply-add is two."""

    products: float
    """Matrix products that tensor-parallel ranks share."""
    attention: float = 0
    """Scores and their product with the values."""
    whole: float = 0
    """Products that every tensor-parallel rank makes whole, counted once."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.products + self.attention + self.whole


class Parameter(NamedTuple):
    """One parameter, as one rank has it."""

    elements: int
    fixed: bool = False
    """Stored, never trained."""


class Product(NamedTuple):
    """The sizes of a matrix product on one rank: [m, k] times [k, n]."""

    m: float
    n: float
    k: float


@dataclass(frozen=True)
class Attention:
    """One kind of attention of a tower, forward, on all ranks together."""

    operations: float
    heads: int
    width: int
    """Of a head."""
    length: float
    """Positions that attend to each other."""


@dataclass(frozen=True)
class Passage:
    """What a tower's forward pass takes time for, on one rank."""

    products: Sequence[Product]
    attention: Sequence[Attention]
    moved: float
    """Bytes that element-wise work reads and writes."""
    stream: float
    """Bytes of the residual stream: of one tensor of that work, and of one collective."""
    collectives: int
    """All-gathers and reduce-scatters of the stream."""
    layers: int
    """Layers, for the kernels that are launched."""


class TowerCost(Protocol):
    """The cost of a tower; ``own`` is its branch of the recipe."""

    def parameters(self, own: Any, tensor: int) -> list[Parameter]:
        """Return each parameter, in the order of the module."""

    def work(self, own: Any, pictures: Pictures) -> Work:
        """Return the operations of a forward pass."""

    def again(self, own: Any, pictures: Pictures) -> float:
        """Return the operations that the backward pass of a tower that learns makes a second time."""

    def kept(self, own: Any, tensor: int, pictures: Pictures, kernels: Kernels) -> float:
        """Return the bytes that a tower that learns keeps from the forward to the backward pass."""

    def passing(self, own: Any, tensor: int, pictures: Pictures, kernels: Kernels, *, learns: bool) -> float:
        """Return the most bytes that its forward pass needs beyond what it keeps: all of them, where it is frozen."""

    def rebuilt(self, own: Any, tensor: int, pictures: Pictures, kernels: Kernels) -> float:
        """Return the bytes that the backward pass of a tower that learns needs beside what was kept."""

    def passage(self, own: Any, tensor: int, pictures: Pictures, kernels: Kernels) -> Passage:
        """Return what a forward pass takes time for."""


class ConnectorCost(Protocol):
    """The cost of a connector; ``own`` is the ``model`` branch of the recipe."""

    def parameters(self, own: Any, tensor: int) -> list[Parameter]:
        """Return each parameter, in the order of the module."""

    def work(self, own: Any, pictures: Pictures) -> Work:
        """Return the operations of a forward pass."""

    def kept(self, own: Any, tensor: int, pictures: Pictures, kernels: Kernels, *, learns: bool) -> float:
        """Return the bytes that it keeps where the tower or it learns; ``learns``: whether it does itself."""


class Shards(Protocol):
    """How a layer is cut: what a layout tells, and all that a cost may ask of it.

    A search asks once for all layouts that are alike in these.
    """

    @property
    def tensor(self) -> int:
        """Tensor-parallel ranks."""

    @property
    def sequence_parallel(self) -> bool:
        """Whether they share the sequence between the layers' products."""

    @property
    def context(self) -> int:
        """Context-parallel ranks: each has so many times fewer tokens than the pack."""

    @property
    def expert_tensor(self) -> int:
        """Ranks that share each expert."""


class LayerPassing(NamedTuple):
    """Bytes that come and go within a language layer, beyond what is kept."""

    forward: int
    backward: int
    gathered: int
    """Of what ranks gather to share key/value heads: at another time than the others."""


@dataclass(frozen=True)
class LayerPassage:
    """What a language layer's forward pass takes time for, on one rank."""

    products: Sequence[tuple[int, int]]
    """Rows and columns of the weights."""
    heads: int
    """Attention heads, on all ranks."""
    width: int
    """Of a head."""
    moved: float
    """Bytes that element-wise work reads and writes, if every pass over memory is worth it."""
    gathered: float
    """Bytes that ranks gather to share key/value heads."""
    cast_inputs: float
    """Numbers of a token that FP8 products take in, forward."""
    cast_gradients: float
    """And as gradients, backward."""
    keys_and_values: float = 0.0
    """Bytes of the keys and values of a rank's positions, which context-parallel ranks hand to each other."""
    dispatched: float = 0.0
    """Bytes that a rank sends to where its tokens' experts are, and gets back."""


class DecoderCost(Protocol):
    """The cost of a language model; ``own`` is its branch of the recipe."""

    def vocabulary(self, own: Any, tensor: int) -> int:
        """Return the rows of the embedding over all ranks, padding among them."""

    def layer_parameters(self, own: Any, tensor: int) -> list[int]:
        """Return the elements of each parameter of one layer on one rank."""

    def linear_parameters(self, own: Any, tensor: int) -> list[int]:
        """Return the elements of those of them that adapters stand beside, and that Q-LoRA quantises."""

    def adapter_parameters(self, own: Any, lora: LoraConfig, tensor: int) -> list[int]:
        """Return the elements of each adapter parameter of one layer on one rank, but those of experts."""

    def adapter_widths(self, own: Any, lora: LoraConfig, tensor: int) -> tuple[int, int]:
        """Return the numbers of a token that the adapters of one layer read, and that they add to."""

    def layer_work(self, own: Any, tokens: float, squared_lengths: float) -> Work:
        """Return the operations of a forward pass through one layer; the sum of squares is of segments' lengths."""

    def cross_parameters(self, own: Any, tensor: int) -> list[int]:
        """Return the elements of each parameter of a layer that attends to pictures; asked where there are such."""

    def cross_kept(
        self, own: Any, shards: Shards, tokens: int, features: float, kernels: Kernels, *, learns: bool
    ) -> int:
        """Return the bytes that one such layer keeps, beside the features."""

    def cross_linear_parameters(self, own: Any, tensor: int) -> list[int]:
        """Return ``linear_parameters`` of one such layer."""

    def cross_adapter_parameters(self, own: Any, lora: LoraConfig, tensor: int) -> list[int]:
        """Return ``adapter_parameters`` of one such layer: of what reads the text, and of what reads features."""

    def cross_adapter_work(self, own: Any, lora: LoraConfig, tokens: float, features: float) -> float:
        """Return the operations of a forward pass through the adapters of one such layer."""

    def cross_adapters_kept(
        self, own: Any, lora: LoraConfig, shards: Shards, tokens: int, features: float, kernels: Kernels
    ) -> int:
        """Return the bytes that the adapters of one such layer keep."""

    def layer_kept(self, own: Any, shards: Shards, tokens: int, kernels: Kernels, *, learns: bool) -> int:
        """Return the bytes that one layer keeps without recomputation."""

    def attention_kept(self, own: Any, shards: Shards, tokens: int, kernels: Kernels, *, learns: bool) -> int:
        """Return what of these is not kept where the core attention is recomputed."""

    def adapters_kept(self, own: Any, lora: LoraConfig, shards: Shards, tokens: int, kernels: Kernels) -> int:
        """Return the bytes that the adapters of one layer keep."""

    def shared_kept(self, own: Any, tokens: int) -> int:
        """Return the bytes that are kept once for all layers that are recomputed."""

    def layer_passing(
        self, own: Any, lora: LoraConfig, shards: Shards, tokens: int, kernels: Kernels, *, learns: bool
    ) -> LayerPassing:
        """Return what comes and goes within a layer."""

    def layer_passage(self, own: Any, shards: Shards, tokens: int, kernels: Kernels) -> LayerPassage:
        """Return what a forward pass through one layer takes time for."""


def decoder_cost(language: LanguageConfig) -> DecoderCost:
    """Return the cost of a language model's architecture.

    Raises:
        NoCostError: it has none.
    """
    cost: DecoderCost = _cost("language", language.preset)
    return cost


class FinalParameter(NamedTuple):
    """A parameter behind the layers of a language model, as one rank has it."""

    elements: int
    head: bool = False
    """It is the output layer's: its bias."""


def norm_weights(language: LanguageConfig, tensor: int) -> list[int]:
    """Return the elements of the weights of one layer's norms on one rank; of what lora.train_norms goes with."""
    cost: Any = decoder_cost(language)
    return list(cost.norm_weights(language, tensor))


def final_parameters(language: LanguageConfig, tensor: int) -> list[FinalParameter]:
    """Return what a language model has behind its layers on one rank, but the output layer's weight.

    A cost has ``final_parameters(own, tensor)`` where that is not one norm's weight.
    """
    own = getattr(decoder_cost(language), "final_parameters", None)
    return [FinalParameter(language.hidden_size)] if own is None else list(own(language, tensor))


def attended_squares(language: LanguageConfig, tokens: float, squared_lengths: float) -> float:
    """Return the sum of squares of segments' lengths that attention of an average layer is worth.

    A cost has ``attended(own, tokens, squared_lengths)`` where layers do not attend to all before a position.
    """
    own = getattr(decoder_cost(language), "attended", None)
    return squared_lengths if own is None else float(own(language, tokens, squared_lengths))


def features_of(model: ModelConfig, pictures: Pictures) -> float:
    """Return the features of pictures that layers attend to: a tower's ``features``, or its patches.

    Where others stand among the tokens, so many for each of these patches.
    """
    if model.language.feature_width:
        return pictures.patches * model.vision.features_past[0]
    own = getattr(cost_of(model, "vision"), "features", None)
    return pictures.patches if own is None else float(own(model.vision, pictures))


def crossed_work(model: ModelConfig, tokens: float, pictures: Pictures) -> Work:
    """Return the operations of a forward pass through one layer that attends to pictures.

    A language model with ``attending_layers`` has ``cross_work`` in its cost. Every token is taken to see one picture.
    """
    features = features_of(model, pictures)
    pairs = tokens * features / max(pictures.count, 1)
    work: Work = _cost("language", model.language.preset).cross_work(model.language, tokens, features, pairs)
    return work


def final_norm_kept(language: LanguageConfig, elements: int, kernels: Kernels, *, learns: bool) -> int:
    """Return the bytes that the norm behind the layers keeps of so many elements.

    A cost has ``norm_kept`` of these arguments where that norm is no RMSNorm.
    """
    own = getattr(decoder_cost(language), "norm_kept", None)
    if own is not None:
        return int(own(language, elements, kernels, learns=learns))
    return elements * (kernels.number_bytes if kernels.fused else 4 + kernels.number_bytes * int(learns))


def cost_of(model: ModelConfig, branch: str) -> Any:
    """Return the cost of a branch's architecture.

    Raises:
        NoCostError: it has none.
    """
    cost = _cost(branch, getattr(model, branch).preset)
    return _WithLevels(cost) if branch == "connector" and model.vision.deepstack else cost


class _WithLevels:
    """The cost of a connector with those of a deepstack's levels (:class:`ConnectorCost`)."""

    def __init__(self, cost: Any) -> None:
        self._cost = cost

    def parameters(self, own: ModelConfig, tensor: int) -> list[Parameter]:
        """Return each parameter, in the order of the modules."""
        return [one for model in self._each(own) for one in self._cost.parameters(model, tensor)]

    def work(self, own: ModelConfig, pictures: Pictures) -> Work:
        """Return the operations of a forward pass."""
        found = [self._cost.work(model, pictures) for model in self._each(own)]
        return Work(*(sum(getattr(one, name) for one in found) for name in ("products", "attention", "whole")))

    def kept(self, own: ModelConfig, tensor: int, pictures: Pictures, kernels: Kernels, *, learns: bool) -> float:
        """Return the bytes that they keep: the last layer's input is a view of all layers' features side by side."""
        beside = own.vision.deepstack * pictures.patches * own.vision.feature_size * kernels.number_bytes
        each = (self._cost.kept(model, tensor, pictures, kernels, learns=learns) for model in self._each(own))
        return beside + sum(each)

    @staticmethod
    def _each(model: ModelConfig) -> list[ModelConfig]:
        return [model, *[replace(model, connector=model.connector.level)] * model.vision.deepstack]


def costless(model: ModelConfig) -> list[str]:
    """Return the branches of a model whose architectures have no cost."""
    return [branch for branch in BRANCHES if architecture_of(model, branch).cost is None]


def _cost(branch: str, preset: str) -> Any:
    load()
    architecture = BRANCHES[branch].find(preset).architecture
    assert architecture is not None
    if architecture.cost is None:
        raise NoCostError(
            f"model.{branch}.preset: the {architecture.name} architecture of {preset!r} has no figures of its cost,"
            " which plan, MFU and the order of packs (data.balance_images) need; give it a cost"
            " (docs/architecture.md)"
        )
    return architecture.cost
