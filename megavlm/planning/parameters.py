"""Parameters of each model chunk on one rank, counted from the recipe: the shapes that the builders make.

Every number is of one tensor-parallel rank, and in elements. ``tests/planning/test_parameters.py`` holds them
against real models.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from megavlm.architectures import registry
from megavlm.config.errors import RecipeError
from megavlm.config.lora import NF4_BLOCK, NF4_GROUP, targets_of
from megavlm.config.schema import LanguageConfig, LoraConfig, ModelConfig, Recipe, VisionConfig
from megavlm.config.split import is_replicated, tensor_ranks
from megavlm.planning.layout import Chunk, Layout

_BUILDERS = {
    "vision": {"megavlm.architectures.towers.vit.build"},
    "connector": {"megavlm.architectures.connectors.resampler.build", "megavlm.architectures.connectors.mlp.build"},
    "language": {"megavlm.architectures.decoders.decoder.build"},
}
_ALIGNMENT = 64
"""Elements to which the distributed optimizer's buffer aligns the start of each parameter."""
NF4_BYTES = (4 + 8 / NF4_BLOCK + 32 / (NF4_BLOCK * NF4_GROUP)) / 8
"""Of a quantised weight: its code, and its share of the two levels of scales."""
_BUCKET_ALIGNMENT = 128
"""The end of a bucket is aligned to a multiple of this and of the data-parallel size."""


_Kind = tuple[ModelConfig, LoraConfig, tuple[bool, bool, bool], int, int, bool, bool]
"""What a chunk's parameters depend on: model, what learns, TP, layers, first, last."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a chunk."""

    module: str
    """vision, connector or language."""
    elements: int
    learns: bool
    quantised: bool = False
    """Kept in 4 bits, with two levels of scales."""


def check_builders(model: ModelConfig) -> None:
    """Check that the planner knows the modules of this model.

    Raises:
        RecipeError: a preset of another package, with a module of its own.
    """
    registry.load_presets()
    found = {"vision": registry.VISION, "connector": registry.CONNECTORS, "language": registry.LANGUAGE}
    for part, kind in found.items():
        name = getattr(model, part).preset
        if kind.find(name).module not in _BUILDERS[part]:
            raise RecipeError(
                f"model.{part}.preset: the planner has no figures for the module of {name!r}; plan with a preset of"
                " megavlm of the same shape"
            )


def padded_vocabulary(language: LanguageConfig, tensor: int) -> int:
    """Return the rows of the embedding over all tensor-parallel ranks, padding among them."""
    multiple = language.vocab_divisor * tensor
    return -(-language.vocab_size // multiple) * multiple


def vision_shapes(vision: VisionConfig, tensor: int) -> list[int]:
    """Return the elements of each parameter of the tower on one rank."""
    width, ffn = vision.hidden_size, vision.ffn_hidden_size
    shapes = [3 * vision.patch_size**2 * width, (vision.positional_grid**2 + int(vision.class_token)) * width]
    shapes += [width] * int(vision.conv_bias) + [width] * int(vision.class_token)
    shapes += [width, width] * (int(vision.pre_layernorm) + int(vision.post_layernorm))
    layer = [width] * 4  # two LayerNorms
    layer += [3 * width * width // tensor, 3 * width // tensor, width * width // tensor, width]
    layer += [width * ffn // tensor, ffn // tensor, ffn * width // tensor, width]
    return shapes + layer * vision.num_layers


def connector_shapes(model: ModelConfig, tensor: int) -> list[int]:
    """Return the elements of each parameter of the connector on one rank, without the resampler's fixed positions."""
    width, hidden = model.vision.hidden_size, model.language.hidden_size
    queries = model.connector.num_queries
    if queries is None:
        shapes = []
        for layer in range(mlp_depth(model.connector.preset)):
            size_in = width if layer == 0 else hidden
            shapes += [size_in * hidden // tensor, hidden // tensor if layer % 2 == 0 else hidden]
        return shapes
    square = hidden * hidden // tensor
    shapes = [queries * hidden] + [hidden] * 6  # the queries; three LayerNorms
    if width != hidden:
        shapes.append(width * hidden // tensor)
    return shapes + [square, hidden // tensor] * 3 + [square, hidden, square]


def mlp_depth(preset: str) -> int:
    """Return the number of layers of ``linear`` or ``mlpNx_gelu``."""
    digits = preset.removeprefix("mlp").partition("x")[0]
    return int(digits) if digits.isdigit() else 1


def local_groups(language: LanguageConfig, tensor: int) -> int:
    """Return the key/value heads that one rank attends with: its share, or one that several ranks share."""
    return max(language.num_query_groups // tensor, 1)


def gathered_width(language: LanguageConfig, tensor: int) -> int:
    """Return the numbers of a token that ranks gather of QKV, each the whole of it, to share key/value heads; else 0.

    Megatron-Core splits the rows of the projection evenly, whichever heads they belong to.
    """
    if language.num_query_groups >= tensor:
        return 0
    return (language.num_attention_heads + 2 * language.num_query_groups) * language.kv_channels


def layer_shapes(language: LanguageConfig, tensor: int) -> list[int]:
    """Return the elements of each parameter of one language layer on one rank."""
    hidden, queries = language.hidden_size, language.num_attention_heads * language.kv_channels
    qkv = (queries + 2 * language.num_query_groups * language.kv_channels) // tensor
    shapes = [hidden, hidden, hidden * qkv, queries // tensor * hidden]
    shapes += [qkv] * int(language.add_qkv_bias) + [language.kv_channels] * (2 * int(language.qk_layernorm))
    ffn = language.ffn_hidden_size // tensor
    return [*shapes, 2 * ffn * hidden, ffn * hidden]


def chunk_parameters(recipe: Recipe, layout: Layout, chunk: Chunk) -> tuple[Parameter, ...]:
    """Return the parameters of one chunk on one tensor-parallel rank."""
    return _chunk_parameters(*_kind(recipe, layout, chunk))


def _kind(recipe: Recipe, layout: Layout, chunk: Chunk) -> _Kind:
    modules = recipe.modules
    learns = (not modules.vision.freeze, not modules.connector.freeze, not modules.language.freeze)
    return recipe.model, recipe.lora, learns, layout.tensor, chunk.layers, chunk.first, chunk.last


def adapter_shapes(language: LanguageConfig, lora: LoraConfig, tensor: int) -> list[int]:
    """Return the elements of each adapter parameter of one language layer on one rank."""
    assert lora.rank is not None
    hidden, width, ffn = language.hidden_size, language.kv_channels, language.ffn_hidden_size
    queries, keys = language.num_attention_heads * width, language.num_query_groups * width
    found = targets_of(lora, language.layer_names)
    shapes = []
    for target in found:
        if target.linear.endswith("linear_qkv"):
            rows = (queries + 2 * keys) if target.parts == 1 else (queries, keys, keys)[target.part]
            shapes += [lora.rank * hidden, lora.rank * rows // tensor]
        elif target.linear.endswith("linear_fc1"):
            shapes += [lora.rank * hidden, lora.rank * ffn // tensor]
        else:
            inputs = queries if target.linear.endswith("linear_proj") else ffn
            shapes += [lora.rank * inputs // tensor, lora.rank * hidden]
    return shapes


def adapter_widths(language: LanguageConfig, lora: LoraConfig, tensor: int) -> tuple[int, int]:
    """Return the numbers of a token that the adapters of one language layer read, and that they add to."""
    hidden, ffn = language.hidden_size, language.ffn_hidden_size // tensor
    queries, keys = (
        n * language.kv_channels // tensor for n in (language.num_attention_heads, language.num_query_groups)
    )
    linears = {target.linear.rpartition(".")[2] for target in targets_of(lora, language.layer_names)}
    widths = {
        "linear_qkv": (hidden, queries + 2 * keys), "linear_proj": (queries, hidden),
        "linear_fc1": (hidden, 2 * ffn), "linear_fc2": (ffn, hidden),
    }  # fmt: skip
    return sum(widths[name][0] for name in linears), sum(widths[name][1] for name in linears)


# A search asks for the same chunks over and over.
@functools.lru_cache(maxsize=4096)
def _chunk_parameters(
    model: ModelConfig,
    lora: LoraConfig,
    learns: tuple[bool, bool, bool],
    tp: int,
    layers: int,
    first: bool,
    last: bool,
) -> tuple[Parameter, ...]:
    language = model.language
    table = padded_vocabulary(language, tp) // tp * language.hidden_size
    found: list[Parameter] = []
    if first:
        own = {part: tensor_ranks(model, part, tp) for part in ("vision", "connector")}
        found += [Parameter("vision", elements, learns[0]) for elements in vision_shapes(model.vision, own["vision"])]
        found += [Parameter("connector", elements, learns[1]) for elements in connector_shapes(model, own["connector"])]
        if model.connector.num_queries is not None:  # positions: stored, never trained
            found.append(Parameter("connector", model.connector.num_queries * language.hidden_size, False))
    shapes = layer_shapes(language, tp) * layers
    if first:
        shapes.append(table)
    if last:
        shapes.append(language.hidden_size)
        # A tied output layer has a copy of its own, unless the embedding lies in the same chunk.
        if not (language.tie_word_embeddings and first):
            shapes.append(table)
    if lora.rank is None:
        return (*found, *(Parameter("language", elements, learns[2]) for elements in shapes))
    return (*found, *_with_adapters(language, lora, tp, layers, first, last))


def _with_adapters(
    language: LanguageConfig, lora: LoraConfig, tp: int, layers: int, first: bool, last: bool
) -> Iterator[Parameter]:
    """Yield the language model's parameters of a chunk: adapters learn, and of the others what the recipe says."""
    table = padded_vocabulary(language, tp) // tp * language.hidden_size
    linears = linear_shapes(language, tp)
    for elements in layer_shapes(language, tp) * layers:
        yield Parameter("language", elements, False, lora.quantize is not None and elements in linears)
    for elements in adapter_shapes(language, lora, tp) * layers:
        yield Parameter("language", elements, True)
    if first:
        yield Parameter("language", table, lora.train_embeddings)
    if last:
        yield Parameter("language", language.hidden_size, False)
        if not (language.tie_word_embeddings and first):
            yield Parameter("language", table, lora.train_head)


def linear_shapes(language: LanguageConfig, tensor: int) -> list[int]:
    """Return the elements of a layer's four linear weights; norms and biases are smaller."""
    return sorted(layer_shapes(language, tensor))[-4:]


@functools.lru_cache(maxsize=4096)
def _elements(kind: _Kind, data: int) -> tuple[int, int, int]:
    """Return frozen elements, learning ones, and those of the buffer that holds the learning ones.

    ``data`` is the data-parallel size for the distributed optimizer's padding, or 0 for none.
    """
    parameters = _chunk_parameters(*kind)
    sizes = [parameter.elements for parameter in parameters if parameter.learns]
    learning = sum(sizes)
    frozen = sum(parameter.elements for parameter in parameters) - learning
    return frozen, learning, buffer_elements(sizes, data) if data else learning


def learning_elements(recipe: Recipe, layout: Layout, chunk: Chunk) -> int:
    """Return the elements of a chunk that learn, on one tensor-parallel rank."""
    return _elements(_kind(recipe, layout, chunk), 0)[1]


def replicated_elements(recipe: Recipe, layout: Layout) -> int:
    """Return the elements on the first stage that learn and whose gradients tensor-parallel ranks add up."""
    parts = {part for part in ("vision", "connector") if is_replicated(recipe.model, part, layout.tensor)}
    found = chunk_parameters(recipe, layout, layout.chunks[0]) if parts else ()
    return sum(parameter.elements for parameter in found if parameter.learns and parameter.module in parts)


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
    optimizer spreads over the data-parallel ranks.
    """
    parallel = recipe.parallel
    half = recipe.training.precision != "fp32"
    weight = 2 if half else 4
    ranks = layout.data if parallel.use_distributed_optimizer else 1
    padded_for = layout.data if parallel.use_distributed_optimizer else 0
    chunks = [_elements(_kind(recipe, layout, chunk), padded_for) for chunk in layout.chunks_of(stage)]
    frozen, learning, buffer = (sum(column) for column in zip(*chunks, strict=True))
    per_element = 12 if half else 8
    packed = sum(
        parameter.elements
        for chunk in layout.chunks_of(stage)
        for parameter in chunk_parameters(recipe, layout, chunk)
        if parameter.quantised
    )
    return StaticBytes(
        weights=weight * (frozen - packed + buffer) + int(packed * NF4_BYTES),
        gradients=4 * buffer,
        optimizer=per_element * learning // ranks,
    )


def buffer_elements(sizes: list[int], data: int) -> int:
    """Return the elements of a distributed optimizer's buffer that holds parameters of these sizes, in one bucket."""
    end = 0
    for size in sizes:
        end = -(-end // _ALIGNMENT) * _ALIGNMENT + size
    multiple = math.lcm(data, _BUCKET_ALIGNMENT)
    return -(-end // multiple) * multiple
