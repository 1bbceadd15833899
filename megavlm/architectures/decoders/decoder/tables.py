"""Names of a decoder's weights in published checkpoints, and which of its layers adapters may stand beside."""

from __future__ import annotations

import dataclasses
import functools

from megavlm.architectures.decoders.decoder.config import DecoderConfig
from megavlm.config.lora import CROSS_LINEARS, EXPERT_LINEARS, LATENT_LINEARS, SHARED_LINEARS, Target
from megavlm.weights.rules import (
    CONCAT,
    HEAD_ROWS,
    KEY_VALUE,
    KEY_VALUE_BLOCKS,
    QKV,
    QKV_BLOCKS,
    STACKED,
    STACKED_INPUTS_FIRST,
    Aside,
    Row,
    Table,
    both,
    row,
)
from megavlm.weights.targets import targets_in

QWEN_LANGUAGE = Table(
    part="language",
    ours="decoder.layers.{}.",
    theirs="transformer.h.{}.",
    layer=(
        row("input_layernorm.weight", "ln_1.weight"),
        *both("self_attention.linear_qkv", "attn.c_attn", QKV_BLOCKS),
        row("self_attention.linear_proj.weight", "attn.c_proj.weight"),
        row("pre_mlp_layernorm.weight", "ln_2.weight"),
        row("mlp.linear_fc1.weight", "mlp.w2.weight mlp.w1.weight", CONCAT),  # w2 is the gate
        row("mlp.linear_fc2.weight", "mlp.c_proj.weight"),
    ),
    rest=(
        row("embedding.word_embeddings.weight", "transformer.wte.weight"),
        row("decoder.final_layernorm.weight", "transformer.ln_f.weight"),
        row("output_layer.weight", "lm_head.weight"),
    ),
    aside=(
        Aside(r"transformer\.h\.\d+\.attn\.(masked_)?bias", "causal mask buffer"),
        Aside(r"transformer\.(h\.\d+\.attn\.)?rotary_emb\.inv_freq", "rotary frequency buffer"),
    ),
)
"""Qwen v1."""

LLAMA_LANGUAGE = Table(
    part="language",
    ours="decoder.layers.{}.",
    theirs="{model}layers.{}.",
    layer=(
        *both("input_layernorm", "input_layernorm"),
        *both(
            "self_attention.linear_qkv",
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
            QKV,
        ),
        row("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
        row("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
        row("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
        *both("pre_mlp_layernorm", "post_attention_layernorm"),
        row("mlp.linear_fc1.weight", "mlp.gate_proj.weight mlp.up_proj.weight", CONCAT),
        row("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
    ),
    rest=(
        row("embedding.word_embeddings.weight", "{model}embed_tokens.weight"),
        *both("decoder.final_layernorm", "{model}norm"),
        row("output_layer.weight", "{head}weight"),
    ),
    aside=(
        Aside(r"{model}(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", "rotary frequency buffer"),
        Aside(r"{head}weight", "tied output layer, written out", same_as=r"{model}embed_tokens.weight"),
    ),
    names={"model": "model.", "head": "lm_head."},
)
"""Llama, Vicuna, Qwen2, Qwen2.5, Qwen3, Mistral, Gemma, StableLM, MiniCPM."""

COGVLM_LANGUAGE = dataclasses.replace(
    LLAMA_LANGUAGE,
    layer=(
        row("input_layernorm.weight", "input_layernorm.weight"),
        row("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
        *(
            one
            for ours, kind in (("weight", "language"), ("vision.weight", "vision"))
            for one in (
                row(f"self_attention.linear_qkv.{ours}", f"self_attn.{kind}_expert_query_key_value.weight", QKV_BLOCKS),
                row(f"self_attention.linear_proj.{ours}", f"self_attn.{kind}_expert_dense.weight"),
                row(f"mlp.linear_fc1.{ours}", f"mlp.{kind}_mlp.gate_proj.weight mlp.{kind}_mlp.up_proj.weight", CONCAT),
                row(f"mlp.linear_fc2.{ours}", f"mlp.{kind}_mlp.down_proj.weight"),
            )
        ),
    ),
)
"""CogVLM: Llama's, with weights for the tokens of text and of images."""

COGAGENT_LANGUAGE = dataclasses.replace(
    COGVLM_LANGUAGE,
    layer=(
        *COGVLM_LANGUAGE.layer,
        row("pre_cross_attn_layernorm.weight", "post_cross_attention_layernorm.weight"),
        row("cross_attention.linear_q.weight", "cross_attn.query.weight"),
        row("cross_attention.linear_kv.weight", "cross_attn.key_value.weight", KEY_VALUE_BLOCKS),
        row("cross_attention.linear_proj.weight", "cross_attn.dense.weight"),
    ),
)
"""CogAgent: CogVLM's, and attention to the features of a second tower."""

GEMMA3_LANGUAGE = dataclasses.replace(
    LLAMA_LANGUAGE,
    layer=(
        *(one for one in LLAMA_LANGUAGE.layer if not one.ours[0].startswith("pre_mlp_layernorm")),
        row("self_attn_bda.norm.weight", "post_attention_layernorm.weight"),
        row("pre_mlp_layernorm.weight", "pre_feedforward_layernorm.weight"),
        row("mlp_bda.norm.weight", "post_feedforward_layernorm.weight"),
    ),
)
"""Gemma 3: Llama's, with a norm in front of each branch and one behind."""

CHAMELEON_LANGUAGE = dataclasses.replace(
    LLAMA_LANGUAGE,
    layer=(
        *(one for one in LLAMA_LANGUAGE.layer if "q_layernorm" not in one.ours[0] and "k_layernorm" not in one.ours[0]),
        *both("self_attention.query_norm", "self_attn.q_norm", HEAD_ROWS),
        *both("self_attention.key_norm", "self_attn.k_norm", HEAD_ROWS),
        # Of the 34B: the same names, for norms behind attention and MLP.
        row("self_attn_bda.norm.weight", "input_layernorm.weight"),
        row("mlp_bda.norm.weight", "post_attention_layernorm.weight"),
    ),
)
"""Chameleon: Llama's, with norms of each head's own."""

MLLAMA_LANGUAGE = dataclasses.replace(
    LLAMA_LANGUAGE,
    layer=(
        *(one for one in LLAMA_LANGUAGE.layer if "q_layernorm" not in one.ours[0] and "k_layernorm" not in one.ours[0]),
        row("cross_attention.linear_q.weight", "cross_attn.q_proj.weight"),
        row("cross_attention.linear_kv.weight", "cross_attn.k_proj.weight cross_attn.v_proj.weight", KEY_VALUE),
        row("cross_attention.q_layernorm.weight", "cross_attn.q_norm.weight"),
        row("cross_attention.k_layernorm.weight", "cross_attn.k_norm.weight"),
        row("cross_attention.linear_proj.weight", "cross_attn.o_proj.weight"),
        row("cross_attn_bda.gate", "cross_attn_attn_gate"),
        row("mlp_bda.gate", "cross_attn_mlp_gate"),
    ),
)
"""Llama 3.2 Vision: Llama's, and layers that attend to pictures."""

PHI3_LANGUAGE = dataclasses.replace(
    LLAMA_LANGUAGE,
    layer=(
        row("input_layernorm.weight", "input_layernorm.weight"),
        row("self_attention.linear_qkv.weight", "self_attn.qkv_proj.weight", QKV_BLOCKS),
        row("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
        row("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
        row("mlp.linear_fc1.weight", "mlp.gate_up_proj.weight"),  # the gate above
        row("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
    ),
)
"""Phi-3: Llama's, queries, keys and values in one, and gate and up."""

PHI_LANGUAGE = dataclasses.replace(
    LLAMA_LANGUAGE,
    layer=(
        *both("input_layernorm", "input_layernorm"),
        *both(
            "self_attention.linear_qkv",
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
            QKV,
        ),
        *both("self_attention.q_layernorm", "self_attn.q_layernorm"),
        *both("self_attention.k_layernorm", "self_attn.k_layernorm"),
        *both("self_attention.linear_proj", "self_attn.dense"),
        *both("mlp.linear_fc1", "mlp.fc1"),
        *both("mlp.linear_fc2", "mlp.fc2"),
    ),
    rest=(
        row("embedding.word_embeddings.weight", "{model}embed_tokens.weight"),
        *both("decoder.final_layernorm", "{model}final_layernorm"),
        row("output_layer.weight", "{head}weight"),
        row("output_layer.bias", "{head}bias"),
    ),
)
"""Phi-1.5 and Phi-2."""

_PHI_NORMS = tuple(
    row(f"{ours}.weight", f"{theirs}.weight")
    for ours, theirs in (
        ("input_layernorm", "input_layernorm"),
        ("self_attention.q_layernorm", "self_attn.q_layernorm"),
        ("self_attention.k_layernorm", "self_attn.k_layernorm"),
        ("self_attn_bda.norm", "post_layernorm"),
    )
)
TINYGPT_V_LANGUAGE = dataclasses.replace(
    PHI_LANGUAGE,
    layer=(
        *_PHI_NORMS,
        *(row(f"{one.ours[0].removesuffix('weight')}bias", f"{one.theirs[0].removesuffix('weight')}bias")
          for one in _PHI_NORMS[:3]),
        *both("self_attention.linear_qkv", "self_attn.query_key_value"),  # [q, k, v] of each head, as here
        *both("self_attention.linear_proj", "self_attn.dense"),
        *both("mlp.linear_fc1", "mlp.fc1"),
        *both("mlp.linear_fc2", "mlp.fc2"),
    ),
)  # fmt: skip
"""TinyGPT-V's Phi-2: queries, keys and values in one, and a norm behind attention."""

TINYGPT_V_REST = dataclasses.replace(
    TINYGPT_V_LANGUAGE,
    layer=TINYGPT_V_LANGUAGE.layer[len(_PHI_NORMS) :],
    rest=tuple(one for one in PHI_LANGUAGE.rest if one.ours[0] != "decoder.final_layernorm.weight"),
    aside=(
        *PHI_LANGUAGE.aside,
        Aside(r"{model}(layers\.\d+\.(self_attn\.[qk]_layernorm|(input|post)_layernorm)|final_layernorm)\.weight",
              "norms of Phi-2 before training", carried=True),
    ),
)  # fmt: skip
TINYGPT_V_NORMS = Table(
    part="language",
    ours="decoder.layers.{}.",
    theirs="{model}layers.{}.",
    layer=_PHI_NORMS,
    rest=(row("decoder.final_layernorm.weight", "{model}final_layernorm.weight"),),
)
"""The same in two files: what is frozen, and the weights of norms, which its code trains and saves apart."""

INTERNLM2_LANGUAGE = Table(
    part="language",
    ours="decoder.layers.{}.",
    theirs="{model}layers.{}.",
    layer=(
        row("input_layernorm.weight", "attention_norm.weight"),
        row("self_attention.linear_qkv.weight", "attention.wqkv.weight"),  # [q.., k, v] of each group, as here
        row("self_attention.linear_proj.weight", "attention.wo.weight"),
        row("pre_mlp_layernorm.weight", "ffn_norm.weight"),
        row("mlp.linear_fc1.weight", "feed_forward.w1.weight feed_forward.w3.weight", CONCAT),  # w1 is the gate
        row("mlp.linear_fc2.weight", "feed_forward.w2.weight"),
    ),
    rest=(
        row("embedding.word_embeddings.weight", "{model}tok_embeddings.weight"),
        row("decoder.final_layernorm.weight", "{model}norm.weight"),
        row("output_layer.weight", "{head}weight"),
    ),
    aside=(
        Aside(r"{model}(layers\.\d+\.attention\.)?rotary_emb\.inv_freq", "rotary frequency buffer"),
        Aside(r"{head}weight", "tied output layer, written out", same_as=r"{model}tok_embeddings.weight"),
    ),
    names={"model": "model.", "head": "output."},
)
"""InternLM2 (``modeling_internlm2.py`` of internlm/internlm2-7b)."""

GLM_LANGUAGE = dataclasses.replace(
    LLAMA_LANGUAGE,
    layer=(
        row("input_layernorm.weight", "input_layernorm.weight"),
        *both("self_attention.linear_qkv", "self_attn.q_proj self_attn.k_proj self_attn.v_proj", QKV),
        row("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
        row("self_attn_bda.norm.weight", "post_self_attn_layernorm.weight"),
        row("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
        row("mlp.linear_fc1.weight", "mlp.gate_up_proj.weight"),
        row("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
        row("mlp_bda.norm.weight", "post_mlp_layernorm.weight"),
    ),
)
"""GLM-4-0414, and the language model of GLM-4.1V."""

_FC1, _FC2 = (f"mlp.experts.local_experts.{{}}.linear_{name}.weight" for name in ("fc1", "fc2"))


def _with_experts(*rows: Row) -> Table:
    """Return Llama's table with the rows of layers that have experts; others have Llama's MLP."""
    return dataclasses.replace(LLAMA_LANGUAGE, layer=(*LLAMA_LANGUAGE.layer, *rows))


QWEN3_MOE_LANGUAGE = _with_experts(
    row("mlp.router.weight", "mlp.gate.weight"),
    row(_FC1, "mlp.experts.{}.gate_proj.weight mlp.experts.{}.up_proj.weight", CONCAT),
    row(_FC2, "mlp.experts.{}.down_proj.weight"),
)
"""Qwen3-MoE: each expert has tensors of its own."""

GLM_MOE_LANGUAGE = dataclasses.replace(
    _with_experts(
        row("mlp.router.weight", "mlp.gate.weight"),
        row("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias"),
        row(
            "mlp.shared_experts.linear_fc1.weight",
            "mlp.shared_experts.gate_proj.weight mlp.shared_experts.up_proj.weight",
            CONCAT,
        ),
        row("mlp.shared_experts.linear_fc2.weight", "mlp.shared_experts.down_proj.weight"),
        *QWEN3_MOE_LANGUAGE.layer[-2:],
    ),
    aside=(
        *LLAMA_LANGUAGE.aside,
        Aside(r"{model}layers\.(\d+)\..*", "layer that predicts a token further on", carried=True, behind=True),
    ),
)
"""GLM-4.5, and the language model of GLM-4.5V: an expert that gets every token, and biases that choose."""

_LATENT = "self_attention."
DEEPSEEK_LANGUAGE = dataclasses.replace(
    GLM_MOE_LANGUAGE,
    layer=(
        *(one for one in GLM_MOE_LANGUAGE.layer if not one.ours[0].startswith(_LATENT)),
        row(f"{_LATENT}linear_q_proj.weight", "self_attn.q_proj.weight"),
        row(f"{_LATENT}linear_q_down_proj.weight", "self_attn.q_a_proj.weight"),
        row(f"{_LATENT}q_latent_norm.weight", "self_attn.q_a_layernorm.weight"),
        row(f"{_LATENT}linear_q_up_proj.weight", "self_attn.q_b_proj.weight"),
        row(f"{_LATENT}linear_kv_down_proj.weight", "self_attn.kv_a_proj_with_mqa.weight"),
        row(f"{_LATENT}kv_latent_norm.weight", "self_attn.kv_a_layernorm.weight"),
        row(f"{_LATENT}linear_kv_up_proj.weight", "self_attn.kv_b_proj.weight"),
        row(f"{_LATENT}linear_proj.weight", "self_attn.o_proj.weight"),
    ),
    aside=LLAMA_LANGUAGE.aside,
)
"""DeepSeek-V2: latent attention, experts and such that get every token."""

MIXTRAL_LANGUAGE = _with_experts(
    row("mlp.router.weight", "block_sparse_moe.gate.weight"),
    # w1 is the gate.
    row(_FC1, "block_sparse_moe.experts.{}.w1.weight block_sparse_moe.experts.{}.w3.weight", CONCAT),
    row(_FC2, "block_sparse_moe.experts.{}.w2.weight"),
)
"""Mixtral."""

_DEEPSPEED = "mlp.deepspeed_moe.experts.deepspeed_experts.{}."
MOE_LLAVA_LANGUAGE = _with_experts(
    row("mlp.router.weight", "mlp.deepspeed_moe.gate.wg.weight"),
    row(_FC1, f"{_DEEPSPEED}gate_proj.weight {_DEEPSPEED}up_proj.weight", CONCAT),
    row(_FC2, f"{_DEEPSPEED}down_proj.weight"),
)
"""MoE-LLaVA on StableLM: DeepSpeed's names."""

MOE_LLAVA_PHI_LANGUAGE = dataclasses.replace(
    PHI_LANGUAGE,
    layer=(
        *PHI_LANGUAGE.layer,
        row("mlp.router.weight", "mlp.deepspeed_moe.gate.wg.weight"),
        *both(_FC1.removesuffix(".weight"), f"{_DEEPSPEED}fc1"),
        *both(_FC2.removesuffix(".weight"), f"{_DEEPSPEED}fc2"),
    ),
)
"""MoE-LLaVA on Phi-2."""

MOE_LLAVA_QWEN_LANGUAGE = dataclasses.replace(
    QWEN_LANGUAGE,
    layer=(
        *QWEN_LANGUAGE.layer,
        row("mlp.router.weight", "mlp.deepspeed_moe.gate.wg.weight"),
        row(_FC1, f"{_DEEPSPEED}w2.weight {_DEEPSPEED}w1.weight", CONCAT),
        row(_FC2, f"{_DEEPSPEED}c_proj.weight"),
    ),
)
"""MoE-LLaVA on Qwen v1."""

QWEN3_VL_MOE_LANGUAGE = _with_experts(
    row("mlp.router.weight", "mlp.gate.weight"),
    row(_FC1, "mlp.experts.gate_up_proj", STACKED_INPUTS_FIRST),  # [experts, in, gate and up]
    row(_FC2, "mlp.experts.down_proj", STACKED_INPUTS_FIRST),
)
"""Qwen3-VL-MoE as published: the experts of a layer in one tensor, which multiplies from the right."""

STACKED_MOE_LANGUAGE = _with_experts(
    row("mlp.router.weight", "mlp.gate.weight"),
    row(_FC1, "mlp.experts.gate_up_proj", STACKED),
    row(_FC2, "mlp.experts.down_proj", STACKED),
)
"""The same as Transformers 5 holds it, and writes it of a model that it has not read: [experts, out, in]."""

_BY_NAMES = {
    "qwen": QWEN_LANGUAGE,
    "llama": LLAMA_LANGUAGE,
    "phi3": PHI3_LANGUAGE,
    "phi": PHI_LANGUAGE,
    "phi_fused": TINYGPT_V_LANGUAGE,
    "internlm2": INTERNLM2_LANGUAGE,
    "glm": GLM_LANGUAGE,
}


@functools.cache
def _targets(layer_names: str) -> tuple[Target, ...]:
    return targets_in(_BY_NAMES[layer_names])


@functools.cache
def _expert_of_images_targets() -> tuple[Target, ...]:
    """Return the linear layers for text and those for image tokens."""
    return targets_in(COGVLM_LANGUAGE)


@functools.cache
def _cross_targets() -> tuple[Target, ...]:
    """Return the linear layers of attention to pictures."""
    return tuple(target for target in targets_in(MLLAMA_LANGUAGE) if target.linear in CROSS_LINEARS)


@functools.cache
def _latent_targets(*, down: bool) -> tuple[Target, ...]:
    """Return the linear layers of latent attention and of an MLP behind it.

    Not those down to a latent, which all tensor-parallel ranks have whole.

    Args:
        down: whether queries are made of a latent.
    """
    other = LATENT_LINEARS[0] if down else LATENT_LINEARS[1]
    beside = (other, *EXPERT_LINEARS, *SHARED_LINEARS)
    return tuple(target for target in targets_in(DEEPSEEK_LANGUAGE) if target.linear not in beside)


@functools.cache
def _expert_targets(*, gated: bool, llama: bool) -> tuple[Target, ...]:
    """Return the linear layers of experts, as Qwen3-MoE calls them, and of a Llama as Mixtral does too."""
    others = {
        (target.linear, target.part): (target.path,) if llama else ()
        for target in targets_in(MIXTRAL_LANGUAGE)
        if target.linear in EXPERT_LINEARS
    }
    found = [
        dataclasses.replace(target, others=others[target.linear, target.part])
        for target in targets_in(QWEN3_MOE_LANGUAGE)
        if target.linear in EXPERT_LINEARS
    ]
    return tuple(found) if gated else _without_gate(found)


def _without_gate(found: list[Target]) -> tuple[Target, ...]:
    return tuple(dataclasses.replace(target, part=0, parts=1) for target in found if target.part == target.parts - 1)


@functools.cache
def _shared_targets(*, gated: bool) -> tuple[Target, ...]:
    """Return the linear layers of shared experts, as GLM-4.5 calls them."""
    found = [target for target in targets_in(GLM_MOE_LANGUAGE) if target.linear in SHARED_LINEARS]
    return tuple(found) if gated else _without_gate(found)


def targets(language: DecoderConfig) -> tuple[Target, ...]:
    """Return what ``lora.targets`` may name; of layers that attend to features beside text, not that attention."""
    if language.visual_expert:
        return _expert_of_images_targets()
    found, experts = _targets(language.layer_names), language.expert_layers
    if language.latent_attention:
        found = _latent_targets(down=language.q_lora_rank is not None)
    if language.cross_attention_layers:
        found += _cross_targets()
    if not any(experts):
        return found
    if all(experts):
        found = tuple(target for target in found if not target.linear.startswith("mlp."))
    if language.moe_shared_expert_intermediate_size is not None:
        found += _shared_targets(gated=language.gated_linear_unit)
    return found + _expert_targets(gated=language.gated_linear_unit, llama=language.layer_names == "llama")
