"""What of a decoder's cost is another with latent attention (``layers/latent.py``), by the names of ``cost.py``.

Of norms, MLPs and experts it is that of layers whose keys and values are made of the stream, with as many key/value
heads as heads: here the attention of such is taken out, and that of a latent put in. Values are as wide as keys between
the projections, filled up with zeros.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from megavlm.architectures.cost import Kernels, LayerPassage, Shards, Work
from megavlm.architectures.decoders.decoder import cost as plain
from megavlm.architectures.decoders.decoder.config import DecoderConfig
from megavlm.config.lora import EXPERT_LINEARS, LATENT_LINEARS, SHARED_LINEARS, Target, targets_of
from megavlm.config.schema import LoraConfig


def _queries(language: DecoderConfig) -> int:
    """Return the width of the queries of all heads, and of the keys, and of values between the projections."""
    return language.num_attention_heads * language.kv_channels


def _values(language: DecoderConfig) -> int:
    """Return the width of the values of all heads."""
    assert language.v_head_dim is not None
    return language.num_attention_heads * language.v_head_dim


def _latent(language: DecoderConfig) -> int:
    assert language.kv_lora_rank is not None
    return language.kv_lora_rank


def _expanded(language: DecoderConfig) -> int:
    """Return what the latent is expanded to: keys without a position, and values."""
    free = language.kv_channels - language.rotary_channels
    return language.num_attention_heads * free + _values(language)


def _down(language: DecoderConfig) -> list[int]:
    """Return the elements of the weights that lead down to latents, and to the key with a position."""
    hidden, queries = language.hidden_size, language.q_lora_rank
    shapes = [] if queries is None else [hidden * queries]
    return [*shapes, hidden * (_latent(language) + language.rotary_channels)]


def _latents(language: DecoderConfig) -> list[int]:
    """Return the widths of the latents, which are normalised."""
    return [width for width in (language.q_lora_rank, _latent(language)) if width is not None]


def _up(language: DecoderConfig, tensor: int) -> list[int]:
    """Return the elements of the weights to queries, to keys and values, and behind attention, on one rank."""
    hidden, source = language.hidden_size, language.q_lora_rank or language.hidden_size
    shapes = [source * _queries(language), _latent(language) * _expanded(language), _values(language) * hidden]
    return [elements // tensor for elements in shapes]


def layer_parameters(language: DecoderConfig, tensor: int) -> list[int]:
    """Return the elements of each parameter of one language layer on one rank."""
    found, queries = plain.layer_parameters(language, tensor), _queries(language)
    for attention in (language.hidden_size * (3 * queries // tensor), queries // tensor * language.hidden_size):
        found.remove(attention)
    return [*found, *_down(language), *_latents(language), *_up(language, tensor)]


def norm_weights(language: DecoderConfig, tensor: int) -> list[int]:
    """Return the elements of the weights of one layer's norms on one rank."""
    return [*plain.norm_weights(language, tensor), *_latents(language)]


def linear_parameters(language: DecoderConfig, tensor: int) -> list[int]:
    """Return the elements of a layer's linear weights that adapters may stand beside."""
    return [*_up(language, tensor), *plain.linear_parameters(language, tensor)[2:]]


def _common_width(language: DecoderConfig) -> int:
    """Return the width of the MLP that gets every token of a layer, or 0."""
    experts = language.num_moe_experts is not None
    return (language.moe_shared_expert_intermediate_size or 0) if experts else language.ffn_hidden_size


def _sizes(language: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Return inputs and outputs of the linear layers that adapters may stand beside, by their names in a layer."""
    hidden, ffn = language.hidden_size, _common_width(language)
    gates = 2 if language.gated_linear_unit else 1
    stream, query, expand = LATENT_LINEARS
    sizes = {
        stream: (hidden, _queries(language)), query: (language.q_lora_rank or 0, _queries(language)),
        expand: (_latent(language), _expanded(language)), "self_attention.linear_proj": (_values(language), hidden),
        "mlp.linear_fc1": (hidden, gates * ffn), "mlp.linear_fc2": (ffn, hidden),
    }  # fmt: skip
    return sizes | dict(zip(SHARED_LINEARS, (sizes["mlp.linear_fc1"], sizes["mlp.linear_fc2"]), strict=True))


def _row(linear: str) -> bool:
    """Whether a layer is row-parallel: its inputs are split."""
    return linear.endswith(("linear_proj", "linear_fc2"))


def _own(language: DecoderConfig, lora: LoraConfig) -> list[Target]:
    """Return the layers with adapters of one layer, but those of experts."""
    return [target for target in targets_of(lora, language) if target.linear in _here(language)]


def _here(language: DecoderConfig) -> set[str]:
    """Return the linear layers of a layer of this kind, but those of experts."""
    experts = language.num_moe_experts is not None
    other = {"mlp.linear_fc1", "mlp.linear_fc2"} if experts else set(SHARED_LINEARS)
    return _sizes(language).keys() - other


def adapter_parameters(language: DecoderConfig, lora: LoraConfig, tensor: int) -> list[int]:
    """Return the elements of each adapter parameter of one language layer on one rank, but those of experts."""
    assert lora.rank is not None
    shapes: list[int] = []
    for target in _own(language, lora):
        inputs, outputs = _sizes(language)[target.linear]
        outputs //= target.parts
        split = (inputs // tensor, outputs) if _row(target.linear) else (inputs, outputs // tensor)
        shapes += [lora.rank * width for width in split]
    return shapes


def adapter_widths(language: DecoderConfig, lora: LoraConfig, tensor: int) -> tuple[int, int]:
    """Return the numbers of a token that the adapters of one language layer read, and that they add to."""
    sizes, gates = _sizes(language), 2 if language.gated_linear_unit else 1
    if language.num_moe_experts is not None:  # of all copies of a token
        copies, inner = (
            language.moe_router_topk * language.hidden_size,
            language.moe_router_topk * language.expert_width,
        )
        sizes |= dict(zip(EXPERT_LINEARS, ((copies, gates * inner), (inner, copies)), strict=True))
    read = added = 0
    for linear in {target.linear for target in targets_of(lora, language)} & (_here(language) | {*EXPERT_LINEARS}):
        if linear not in sizes:
            continue
        inputs, outputs = sizes[linear]
        shared_out = linear in EXPERT_LINEARS
        read += inputs // tensor if shared_out or _row(linear) else inputs
        added += outputs // tensor if shared_out or not _row(linear) else outputs
    return read, added


def adapter_products(language: DecoderConfig, lora: LoraConfig, tensor: int) -> list[int]:
    """Return those of ``adapter_parameters`` that a token is multiplied by: all."""
    return adapter_parameters(language, lora, tensor)


def layer_kept(language: DecoderConfig, shards: Shards, tokens: int, kernels: Kernels, *, learns: bool) -> int:
    """Return the bytes that one language layer keeps without recomputation."""
    b, tp = kernels.number_bytes, shards.tensor
    local = tokens // tp if shards.sequence_parallel else tokens
    queries, values = _queries(language) // tp, _values(language) // tp
    kept = plain.layer_kept(language, shards, tokens, kernels, learns=learns)
    # There queries, keys and values stay in what was projected, beside the turned ones; here all three are made anew.
    if shards.context == 1 or kernels.fused:
        kept -= 2 * tokens * queries * b
    if learns:
        kept += tokens * (values - queries) * (1 if kernels.fp8 else b)  # the input of the projection behind attention
        if kernels.fused and not kernels.fp8:  # which the result of attention is not
            kept += tokens * queries * b
    for width in _latents(language):  # what its norm keeps, and the input of the projection that expands it
        kept += plain.norm_kept(language, local * width, kernels, learns=learns) + local * width * b * int(learns)
    # Where that is no conversion, the norm keeps what the key with a position was projected beside.
    return kept + local * language.rotary_channels * b * int(b == 4 or kernels.fused)


def attention_kept(language: DecoderConfig, shards: Shards, tokens: int, kernels: Kernels, *, learns: bool) -> int:
    """Return what of ``layer_kept`` is not kept where the core attention is recomputed."""
    kept = plain.attention_kept(language, shards, tokens, kernels, learns=learns)
    # The input of the projection behind it is a part of its result.
    return kept + tokens * _queries(language) // shards.tensor * kernels.number_bytes * int(kernels.fused and learns)


def adapters_kept(language: DecoderConfig, lora: LoraConfig, shards: Shards, tokens: int, kernels: Kernels) -> int:
    """Return the bytes that the adapters of one language layer keep: what A and B multiply."""
    assert lora.rank is not None
    b, tp = kernels.number_bytes, shards.tensor
    local = tokens // tp if shards.sequence_parallel else tokens
    kept, each = plain.adapters_kept(language, lora, shards, tokens, kernels), b + int(lora.dropout > 0)
    own = [target.linear for target in _own(language, lora)]
    if "self_attention.linear_proj" in own:
        kept += tokens * (_values(language) - _queries(language)) // tp * each
        if kernels.fused and not lora.dropout:  # the result of attention, which that is cut out of
            kept += tokens * _queries(language) // tp * b
    for linear in own:
        if linear in LATENT_LINEARS:
            kept += local * _sizes(language)[linear][0] * each + tokens * lora.rank * b
    if lora.train_norms and not kernels.fused:
        kept += local * sum(_latents(language)) * b
    return kept


def layer_work(language: DecoderConfig, tokens: float, squared_lengths: float) -> Work:
    """Return the operations of a forward pass through one layer; values count as wide as they are."""
    found = plain.layer_work(language, tokens, squared_lengths)
    weights = sum([*_down(language), *_up(language, 1)]) - 4 * language.hidden_size * _queries(language)
    width = _queries(language) + _values(language)
    return Work(products=found.products + 2 * tokens * weights, attention=width * squared_lengths)


def layer_passage(language: DecoderConfig, shards: Shards, tokens: int, kernels: Kernels) -> LayerPassage:
    """Return what a forward pass through one layer takes time for."""
    found, tp, hidden = plain.layer_passage(language, shards, tokens, kernels), shards.tensor, language.hidden_size
    local = tokens // tp if shards.sequence_parallel else tokens
    source = language.q_lora_rank
    down = [(width // hidden, hidden) for width in _down(language)]  # of a part of the sequence, but small
    products = (
        *down,
        (_queries(language) // tp, source or hidden),
        (_expanded(language) // tp, _latent(language)),
        (hidden, _values(language) // tp),
        *found.products[2:],
    )
    # Queries, keys and values are written once more; latents are normalised.
    copied = 2 * 3 * tokens * _queries(language) // tp + 2 * local * sum(_latents(language))
    return replace(found, products=products, moved=found.moved + copied * kernels.number_bytes)


class CostByAttention:
    """A decoder's cost: of latent attention what is here, of any other what ``cost.py`` has."""

    def __getattr__(self, name: str) -> Any:
        own, latent = getattr(plain, name), _OWN.get(name)
        if latent is None:
            return own

        @functools.wraps(own)
        def chosen(language: Any, *args: Any, **kwargs: Any) -> Any:
            there = latent if getattr(language, "kv_lora_rank", None) is not None else own
            return there(language, *args, **kwargs)

        return chosen


_OWN = {
    one.__name__: one
    for one in (
        layer_parameters, norm_weights, linear_parameters, adapter_parameters, adapter_products, adapter_widths,
        layer_kept, attention_kept, adapters_kept, layer_work, layer_passage,
    )
}  # fmt: skip
