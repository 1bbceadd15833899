"""The cost of a decoder-only language model: see :class:`megavlm.architectures.cost.DecoderCost`.

Read off the layers that ``build`` makes, tensor by tensor, for both kinds of layers (Transformer Engine's fused ones
and plain torch). Korthikanti et al. (arXiv 2205.05198) count the same for GPT's layers.
"""

from __future__ import annotations

from megavlm.architectures.cost import FinalParameter, Kernels, LayerPassage, LayerPassing, Shards, Work
from megavlm.architectures.decoders.decoder.adapter_cost import adapter_parameters as adapter_parameters
from megavlm.architectures.decoders.decoder.adapter_cost import adapter_products as adapter_products
from megavlm.architectures.decoders.decoder.adapter_cost import adapter_widths as adapter_widths
from megavlm.architectures.decoders.decoder.adapter_cost import beside, common_width, inner_width
from megavlm.architectures.decoders.decoder.adapter_cost import expert_adapter_parameters as expert_adapter_parameters
from megavlm.architectures.decoders.decoder.config import DecoderConfig, with_all_keys
from megavlm.architectures.decoders.decoder.cross_cost import beside_parameters
from megavlm.architectures.decoders.decoder.cross_cost import cross_adapter_parameters as cross_adapter_parameters
from megavlm.architectures.decoders.decoder.cross_cost import cross_adapter_work as cross_adapter_work
from megavlm.architectures.decoders.decoder.cross_cost import cross_adapters_kept as cross_adapters_kept
from megavlm.architectures.decoders.decoder.cross_cost import cross_kept as cross_kept
from megavlm.architectures.decoders.decoder.cross_cost import cross_linear_parameters as cross_linear_parameters
from megavlm.architectures.decoders.decoder.cross_cost import cross_parameters as cross_parameters
from megavlm.architectures.decoders.decoder.cross_cost import cross_work as cross_work
from megavlm.architectures.decoders.decoder.window_cost import attended as attended
from megavlm.architectures.decoders.decoder.window_cost import masks_kept
from megavlm.config.lora import EXPERT_LINEARS, IMAGE_LINEARS, OF_IMAGES
from megavlm.config.schema import LoraConfig


@with_all_keys
def vocabulary(language: DecoderConfig, tensor: int) -> int:
    """Return the rows of the embedding over all tensor-parallel ranks, padding among them."""
    multiple = language.vocab_divisor * tensor
    return -(-language.vocab_size // multiple) * multiple


def _local_groups(language: DecoderConfig, tensor: int) -> int:
    """Return the key/value heads that one rank attends with: its share, or one that several ranks share."""
    return max(language.num_query_groups // tensor, 1)


def _gathered_width(language: DecoderConfig, tensor: int) -> int:
    """Return the numbers of a token that ranks gather of QKV, each the whole of it, to share key/value heads; else 0.

    Megatron-Core splits the rows of the projection evenly, whichever heads they belong to.
    """
    if language.num_query_groups >= tensor:
        return 0
    return (language.num_attention_heads + 2 * language.num_query_groups) * language.kv_channels


def _projected_by_norms(language: DecoderConfig, tensor: int, number_bytes: int) -> int:
    """Return the numbers of a token, of what QKV's projection gives, that the plain norm of keys holds on to; or 0.

    It reads in fp32. Where that is no conversion, keys are a part of what was projected, all of which then stays,
    although attention of a pack that ranks share asks for none of it.
    """
    queries, keys = language.num_attention_heads // tensor, _local_groups(language, tensor)
    if language.head_layernorm:  # whatever the type
        return (queries + 2 * keys) * language.kv_channels
    if not language.qk_layernorm or (number_bytes != 4 and language.normalization == "RMSNorm"):
        return 0
    return _gathered_width(language, tensor) or (queries + 2 * keys) * language.kv_channels


def _inputs(language: DecoderConfig) -> int:
    """Return the tensors of the stream's width that attention and MLP of a layer read."""
    return 1 if language.use_parallel_residual else 2


def _norm_vectors(language: DecoderConfig) -> int:
    """Return the parameters of a norm: a weight, or a weight and a bias."""
    return 2 if language.normalization == "LayerNorm" else 1


@with_all_keys
def final_parameters(language: DecoderConfig, tensor: int) -> list[FinalParameter]:
    """Return what stands behind the layers on one rank, but the output layer's weight."""
    bias = FinalParameter(vocabulary(language, tensor) // tensor, head=True)
    return [FinalParameter(language.hidden_size)] * _norm_vectors(language) + [bias] * int(language.lm_head_bias)


@with_all_keys
def norm_kept(language: DecoderConfig, elements: int, kernels: Kernels, *, learns: bool) -> int:
    """Return the bytes that a norm of so many elements keeps: its input, and what its weight multiplies."""
    b, zero_centered = kernels.number_bytes, language.layernorm_zero_centered_gamma
    if kernels.fused:
        return elements * b
    if language.normalization == "LayerNorm":
        return elements * (4 if zero_centered else b)
    # What the weight multiplies is in fp32 where 1 is added to it first.
    return elements * (4 + (4 if zero_centered else b) * int(learns))


@with_all_keys
def layer_parameters(language: DecoderConfig, tensor: int) -> list[int]:
    """Return the elements of each parameter of one language layer on one rank."""
    hidden, queries = language.hidden_size, language.num_attention_heads * language.kv_channels
    qkv = (queries + 2 * language.num_query_groups * language.kv_channels) // tensor
    norms = language.pre_norms + language.post_norms
    shapes = [hidden] * (norms * _norm_vectors(language)) + [hidden * qkv, queries // tensor * hidden]
    shapes += [qkv] * int(language.qkv_bias) + [hidden] * int(language.attention_branch_norm)
    shapes += [language.kv_channels] * (2 * _norm_vectors(language) * int(language.qk_layernorm))
    if language.head_layernorm:
        shapes += [queries // tensor] * 2 + [language.num_query_groups * language.kv_channels // tensor] * 2
    if language.num_moe_experts is not None:
        shapes += [hidden] * int(language.add_bias_linear) + [language.num_moe_experts * hidden]  # the router's
        shared = (language.moe_shared_expert_intermediate_size or 0) // tensor
        if not shared:
            return shapes
        shapes += [hidden] * int(language.moe_shared_expert_gate)
        return [*shapes, inner_width(language) * shared * hidden, shared * hidden]
    ffn = language.ffn_hidden_size // tensor
    inner = inner_width(language) * ffn
    shapes += [hidden, inner, hidden] * int(language.add_bias_linear)
    shapes += [inner * hidden, ffn * hidden]
    expert = [hidden * qkv, queries // tensor * hidden, inner * hidden, ffn * hidden]
    return shapes + expert * int(language.visual_expert) + beside_parameters(language, tensor)


@with_all_keys
def norm_weights(language: DecoderConfig, tensor: int) -> list[int]:
    """Return the elements of the weights of one layer's norms on one rank: all of each, but those of a norm a head."""
    stream = language.pre_norms + language.post_norms + int(language.attention_branch_norm)
    weights = [language.hidden_size] * stream + [language.kv_channels] * 2 * int(language.qk_layernorm)
    if language.head_layernorm:
        counts = language.num_attention_heads, language.num_query_groups
        weights += [heads * language.kv_channels // tensor for heads in counts]
    return weights


@with_all_keys
def expert_parameters(language: DecoderConfig, experts: int, tensor: int) -> list[int]:
    """Return the elements of each parameter of the experts of one layer on one rank."""
    if language.num_moe_experts is None:
        return []
    hidden, width = language.hidden_size, language.expert_width // tensor
    inner = inner_width(language) * width
    biases = [inner, hidden] * int(language.add_bias_linear)
    return [inner * hidden, width * hidden, *biases] * (language.num_moe_experts // experts)


def _active_width(language: DecoderConfig) -> int:
    """Return the width of all MLPs together that a token goes through in a layer."""
    if language.num_moe_experts is None:
        return language.ffn_hidden_size
    return language.moe_router_topk * language.expert_width + common_width(language)


@with_all_keys
def linear_parameters(language: DecoderConfig, tensor: int) -> list[int]:
    """Return the elements of a layer's linear weights; of experts, those of the shared ones alone."""
    hidden, queries = language.hidden_size, language.num_attention_heads * language.kv_channels
    qkv = (queries + 2 * language.num_query_groups * language.kv_channels) // tensor
    ffn = common_width(language) // tensor
    mlp = [inner_width(language) * ffn * hidden, ffn * hidden] if ffn else []
    return [hidden * qkv, queries // tensor * hidden, *mlp] * (1 + int(language.visual_expert))


@with_all_keys
def layer_kept(language: DecoderConfig, shards: Shards, tokens: int, kernels: Kernels, *, learns: bool) -> int:
    """Return the bytes that one language layer keeps without recomputation."""
    b, tp = kernels.number_bytes, shards.tensor
    local = tokens // tp if shards.sequence_parallel else tokens
    hidden = language.hidden_size
    queries = language.num_attention_heads * language.kv_channels // tp
    keys = _local_groups(language, tp) * language.kv_channels
    ffn = language.ffn_hidden_size // tp
    stream = local * hidden
    # The norms keep their input, the plain RMSNorm in fp32; what they give goes into a linear layer, or into two.
    norms = (language.pre_norms + language.post_norms) * norm_kept(language, stream, kernels, learns=learns)
    if language.attention_branch_norm:
        norms += stream * (b if kernels.fused else 4 + b * int(learns))
    experts, inputs = language.num_moe_experts is not None, 0
    if experts:
        ffn = 0  # counted below
    if learns:
        # Weights of two kinds see each its own tokens, picked out of all; one weight gathers again where it needs all.
        seen = tokens * hidden if language.visual_expert else stream
        inputs = (_inputs(language) * seen + tokens * (queries + ffn)) * (1 if kernels.fp8 else b)
    # The value stays inside the output of the QKV projection; rotation makes new queries and keys.
    projected = queries + 2 * keys
    gathered = _gathered_width(language, tp)
    # Of what ranks gather to share a key/value head the value is copied, unless a norm in fp32 holds on to all of it.
    plain = language.normalization == "LayerNorm" and not kernels.fused  # it reads as it is, RMSNorm in fp32
    held_whole = bool(gathered) and language.qk_layernorm and not kernels.fused and (b == 4 or plain)
    if gathered:
        projected = keys + gathered * int(held_whole)
    attention = tokens * (projected + queries + keys) * b
    if shards.context > 1 and not kernels.fused:  # those of the whole pack, and not its own in what was projected
        attention = tokens * (queries + 2 * keys * shards.context + _projected_by_norms(language, tp, b)) * b
    attention += tokens * (language.num_attention_heads // tp) * 4  # log-sum-exp of the softmax
    if (
        not kernels.fused or not language.fused_rotary or shards.context > 1
    ):  # cosines and sines, for queries and for keys
        attention += 4 * tokens * language.rotary_channels * b
    # Its result: that of the fused kernel is also the input of the projection behind it.
    attention += 0 if kernels.fused and learns and not kernels.fp8 else tokens * queries * b
    attention += masks_kept(language, tokens, b)
    # Queries of several keys are copied out of what was projected; those of a rank's only key are a part of it.
    copied = language.num_attention_heads != language.num_query_groups and _local_groups(language, tp) > 1
    if language.head_layernorm:  # keys are there already
        read = queries * int(copied)
        scales = 8 * (queries + keys) // language.kv_channels  # mean and deviation of each head, in fp32
        attention += tokens * ((read + (queries + keys) * int(learns)) * b + scales)
    if language.qk_layernorm and plain:  # keys are there already
        read = queries * int(copied)
        attention += tokens * (read * b + 8 * (queries + keys) // language.kv_channels)
    elif language.qk_layernorm:
        # The plain norm reads in fp32: keys are there already, where that is no conversion.
        half = b == 2
        read = (queries + keys) * b if kernels.fused else 4 * (queries * int(half or copied) + keys * int(half))
        multiplied = 4 if language.layernorm_zero_centered_gamma else b
        attention += tokens * (read + (queries + keys) * multiplied * int(learns and not kernels.fused))
        scales = (queries + keys) // language.kv_channels  # one of each head, in fp32
        attention += tokens * scales * 4 * int(not kernels.fused)
    beside = _experts_kept(language, shards, tokens, kernels, learns=learns) if experts else 0
    return norms + inputs + attention + tokens * inner_width(language) * ffn * b + beside


def _experts_kept(language: DecoderConfig, shards: Shards, tokens: int, kernels: Kernels, *, learns: bool) -> int:
    """Return the bytes that router and experts of a layer keep, where each expert gets as many tokens.

    All of them compute what their ranks send: ``moe_router_topk`` copies of each token.
    """
    b, hidden, count = kernels.number_bytes, language.hidden_size, language.num_moe_experts or 0
    local = tokens // shards.tensor if shards.sequence_parallel else tokens
    here = local * language.moe_router_topk * shards.expert_tensor
    width, gates = language.expert_width // shards.expert_tensor, inner_width(language)
    # What is multiplied, forward and for the weights: the tokens' copies and the activation, with its weight. In slices
    # (layers/expert_products.py, on CPUs) the activation is made again of what it was made of.
    sliced = _in_slices(language, kernels)
    kept = here * (hidden + (0 if sliced else width)) * b * int(learns)
    kept += here * (gates + (0 if sliced else 1)) * width * b + here * _COPY_BYTES
    shared = (language.moe_shared_expert_intermediate_size or 0) // shards.tensor
    kept += tokens * shared * (gates + int(learns)) * b
    if shared and language.moe_shared_expert_gate:
        kept += local * (hidden * b + 8)
    kept += local * hidden * b * int(not learns)  # a router keeps what it reads, also where it is frozen
    if sliced:
        return kept + local * (count * _router_bytes(language, learns=learns) + 8)
    return kept + local * (count * _ROUTER_BYTES + _TOKEN_BYTES)


def _in_slices(language: DecoderConfig, kernels: Kernels) -> bool:
    """Whether experts without adapters are computed by ``layers/expert_products.py``."""
    gated = language.gated_linear_unit and language.activation == "silu"
    return not kernels.fused and gated and not language.add_bias_linear


def _router_bytes(language: DecoderConfig, *, learns: bool) -> int:
    """Return the bytes that a plain router keeps of a token and an expert: what its losses and sigmoid are made of."""
    sigmoid, capacity = language.moe_router_score_function == "sigmoid", language.moe_expert_capacity_factor is not None
    losses = int(bool(language.moe_z_loss_coeff)) + int(language.moe_aux_loss_coeff > 0) * (2 if sigmoid else 1)
    return 4 * (losses * int(learns) + int(sigmoid)) + int(capacity)


_ROUTER_BYTES = 13
"""Of a token and an expert: scores in fp32 before, after, and of those that were chosen, and a mark of these."""
_TOKEN_BYTES = 48
"""Of a token: sums and denominators of its scores, of the losses too."""
_COPY_BYTES = 32
"""Of a copy of a token: its weight, and where it comes from, as torch keeps it on the way to the experts and back."""


@with_all_keys
def adapters_kept(language: DecoderConfig, lora: LoraConfig, shards: Shards, tokens: int, kernels: Kernels) -> int:
    """Return the bytes that the adapters of one language layer keep: what A and B multiply."""
    assert lora.rank is not None
    b, tp = kernels.number_bytes, shards.tensor
    local = tokens // tp if shards.sequence_parallel else tokens
    queries, keys = (n * language.kv_channels // tp for n in (language.num_attention_heads, language.num_query_groups))
    inputs = {
        "linear_qkv": local * language.hidden_size, "linear_proj": tokens * queries,
        "linear_fc1": local * language.hidden_size, "linear_fc2": tokens * common_width(language) // tp,
    }  # fmt: skip
    kept = 0
    if lora.train_norms and not kernels.fused:  # what weights of RMSNorm multiply
        stream = language.pre_norms + language.post_norms if language.normalization == "RMSNorm" else 0
        width = 4 if language.layernorm_zero_centered_gamma else b
        kept += local * language.hidden_size * (stream * width + b * int(language.attention_branch_norm))
        heads = (queries + keys) * int(language.qk_layernorm and language.normalization == "RMSNorm")
        kept += tokens * heads * width
    if lora.train_norms and language.head_layernorm:
        kept += tokens * (queries + keys) * b
    if language.num_moe_experts is not None:  # of the copies of tokens
        copies, width = local * language.moe_router_topk * shards.expert_tensor, language.expert_width
        read = {EXPERT_LINEARS[0]: language.hidden_size, EXPERT_LINEARS[1]: width // shards.expert_tensor}
        own = beside(language, lora, experts=True)
        if own and _in_slices(language, kernels):  # which they then are not
            kept += copies * (width // shards.expert_tensor) * b
        kept += sum(copies * read[name] * (b + int(lora.dropout > 0)) for name in {target.linear for target in own})
        kept += len(own) * copies * lora.rank * b
    for name, elements in inputs.items():
        own = [
            target
            for target in beside(language, lora, experts=False)
            if target.linear.removesuffix(OF_IMAGES).endswith(name)
        ]
        if not own:
            continue
        # The fused attention's result is kept as such, and what a router reads, as shared experts do; dropout makes
        # another tensor, and has a mask of bytes.
        routed = name == "linear_fc1" and language.num_moe_experts is not None
        there = (routed or (kernels.fused and name == "linear_proj")) and not lora.dropout
        kept += elements * (b * int(not there) + int(lora.dropout > 0))
        column = name in ("linear_qkv", "linear_fc1")
        # Of a column's, each kind of tokens has its own; of a row's, all have both.
        of_images = sum(target.linear in IMAGE_LINEARS for target in own)
        kinds = max(of_images, len(own) - of_images) if column else len(own)
        kept += kinds * (tokens if column else local) * lora.rank * b
        rows = sum((queries, keys, keys)[target.part] for target in own)
        if own[0].parts == 3 and _gathered_width(language, tp):  # what multiplies each row of the layer, zeros among it
            kept += (queries + 2 * keys) * len(own) * lora.rank * b
        elif own[0].parts == 3:  # the rows of each part's B, side by side
            kept += rows * lora.rank * b
    return kept


@with_all_keys
def shared_kept(language: DecoderConfig, tokens: int) -> int:
    """Return the bytes that are kept once for all layers that are recomputed: the angles of the positions, in fp32."""
    return tokens * language.rotary_channels * 4


@with_all_keys
def attention_kept(language: DecoderConfig, shards: Shards, tokens: int, kernels: Kernels, *, learns: bool) -> int:
    """Return what of ``layer_kept`` is not kept where the core attention is recomputed."""
    heads = language.num_attention_heads // shards.tensor
    kept = tokens * heads * 4 + masks_kept(language, tokens, kernels.number_bytes)
    if shards.context > 1 and not kernels.fused:  # keys and values of the pack; what they are made of stays, as without
        queries, keys = (n * language.kv_channels for n in (heads, _local_groups(language, shards.tensor)))
        held = _projected_by_norms(language, shards.tensor, kernels.number_bytes)
        kept += tokens * (2 * keys * shards.context - 3 * keys - queries + held) * kernels.number_bytes
    # The result is still there as the input of the projection, where that keeps one.
    if not (kernels.fused and learns):
        kept += tokens * heads * language.kv_channels * kernels.number_bytes
    return kept


@with_all_keys
def layer_passing(
    language: DecoderConfig, lora: LoraConfig, shards: Shards, tokens: int, kernels: Kernels, *, learns: bool
) -> LayerPassing:
    """Return what comes and goes within a layer."""
    b, tp = kernels.number_bytes, shards.tensor
    hidden, ffn = language.hidden_size, _active_width(language) // tp
    local = tokens // tp if shards.sequence_parallel else tokens
    wide, stream = tokens * hidden * b, local * hidden * b
    if language.num_moe_experts is not None:  # the copies of tokens, sent and received
        wide += 2 * local * language.moe_router_topk * hidden * b
    # Forward: what the projection gives before it is reduced, and after.
    forward = wide + 2 * stream
    # Backward, beside the gradient of the residual stream: gradients around the activation, less the result that the
    # second product has let go of; then the gradients of the first product's weight and input, less the activation's.
    inner, gates = tokens * ffn * b, inner_width(language)
    backward = 2 * stream + max((gates + 1) * inner, int(learns) * gates * ffn * hidden * b + wide - inner)
    if lora.rank is not None:  # what adapters add to gate and up, before or after the activation's own gradient
        backward = 2 * stream + (gates + 2) * inner
    if lora.quantize is not None:  # the largest weight, while it multiplies
        each = [] if language.num_moe_experts is None else expert_parameters(
            language, language.num_moe_experts, shards.expert_tensor
        )  # fmt: skip
        weight = max(*linear_parameters(language, tp), *each) * b
        forward += weight
        backward = 2 * stream + max((gates + 2) * inner, gates * inner + weight + wide)
    # What ranks gather to share key/value heads, before and after it is put in order, or its gradient. The rest of the
    # layer is not there yet, or no more.
    return LayerPassing(forward, backward, gathered=2 * tokens * _gathered_width(language, tp) * b)


@with_all_keys
def layer_work(language: DecoderConfig, tokens: float, squared_lengths: float) -> Work:
    """Return the operations of a forward pass through one layer, attention over half of the square (causal)."""
    hidden, width = language.hidden_size, language.num_attention_heads * language.kv_channels
    key_value = 2 * language.num_query_groups * language.kv_channels
    weights = hidden * (width + key_value) + width * hidden
    weights += (inner_width(language) + 1) * hidden * _active_width(language)
    if language.num_moe_experts is not None:
        shared_gate = int(language.moe_shared_expert_gate)
        router = 2 * tokens * hidden * (language.num_moe_experts + shared_gate)
        return Work(products=2 * tokens * weights + router, attention=2 * width * squared_lengths)
    return Work(products=2 * tokens * weights, attention=2 * width * squared_lengths)


@with_all_keys
def layer_passage(language: DecoderConfig, shards: Shards, tokens: int, kernels: Kernels) -> LayerPassage:
    """Return what a forward pass through one layer takes time for."""
    tp, b, hidden, ffn = (
        shards.tensor,
        kernels.number_bytes,
        language.hidden_size,
        _active_width(language) // shards.tensor,
    )
    width = language.num_attention_heads * language.kv_channels
    queries, keys = width // tp, language.num_query_groups * language.kv_channels // tp
    held = _local_groups(language, tp) * language.kv_channels  # keys that this rank attends with
    local = tokens // tp if shards.sequence_parallel else tokens
    rotated = tokens * (width // tp + held) * b
    gathered = tokens * _gathered_width(language, tp) * b
    ffn_each, queries_each, gates = _active_width(language) / tp, width / tp, inner_width(language)
    sent = local * language.moe_router_topk * hidden * b if language.num_moe_experts is not None else 0
    copies = 1 if language.num_moe_experts is None else language.moe_router_topk  # of a token, as its MLPs read them
    # A norm reads and writes, a sum reads two and writes one.
    stream = 2 * (language.pre_norms + language.post_norms + int(language.attention_branch_norm)) + 6
    return LayerPassage(
        products=((queries + 2 * keys, hidden), (hidden, queries), (gates * ffn, hidden), (hidden, ffn)),
        heads=language.num_attention_heads,
        width=language.kv_channels,
        # Norms and residuals; rotation; gated activation.
        moved=stream * local * hidden * b
        + 2 * rotated
        + (gates + 1) * tokens * _active_width(language) // tp * b
        + 8 * sent,  # tokens' copies are made, put in order, and added up, on both sides of what sends them
        dispatched=sent,
        gathered=gathered,
        cast_inputs=(1 + copies) * hidden + queries_each + ffn_each,
        cast_gradients=(1 + copies) * hidden + queries_each + 2 * held + gates * ffn_each,
        keys_and_values=2 * tokens * held * b,
    )
