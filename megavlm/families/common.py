"""Tables that several families share, and helpers to read a config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megavlm.config.errors import UserError
from megavlm.weights.rules import CONCAT, QKV, QKV_BLOCKS, SPLIT3, TRANSPOSE, Aside, Table, both, row

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
        row("input_layernorm.weight", "input_layernorm.weight"),
        *both(
            "self_attention.linear_qkv",
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
            QKV,
        ),
        row("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
        row("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
        row("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
        row("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
        row("mlp.linear_fc1.weight", "mlp.gate_proj.weight mlp.up_proj.weight", CONCAT),
        row("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
    ),
    rest=(
        row("embedding.word_embeddings.weight", "{model}embed_tokens.weight"),
        row("decoder.final_layernorm.weight", "{model}norm.weight"),
        row("output_layer.weight", "{head}weight"),
    ),
    aside=(
        Aside(r"{model}(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", "rotary frequency buffer"),
        Aside(r"{head}weight", "tied output layer, written out", same_as=r"{model}embed_tokens.weight"),
    ),
    names={"model": "model.", "head": "lm_head."},
)
"""Llama, Vicuna, Qwen2, Qwen2.5, Qwen3."""

_VIT_LAYER = "transformer.layers.{}."

QWEN_VISION = Table(
    part="vision",
    ours=_VIT_LAYER,
    theirs="transformer.resblocks.{}.",
    layer=(
        *both("input_layernorm", "ln_1"),
        *both("self_attention.linear_qkv", "attn.in_proj"),  # already [q, k, v] per head
        *both("self_attention.linear_proj", "attn.out_proj"),
        *both("pre_mlp_layernorm", "ln_2"),
        *both("mlp.linear_fc1", "mlp.c_fc"),
        *both("mlp.linear_fc2", "mlp.c_proj"),
    ),
    rest=(
        row("conv1.weight", "conv1.weight"),
        row("positional_embedding", "positional_embedding"),
        *both("ln_pre", "ln_pre"),
    ),
    prefix="transformer.visual.",
)
"""The tower of Qwen-VL."""

TRANSFORMERS_VISION = Table(
    part="vision",
    ours=_VIT_LAYER,
    theirs="encoder.layers.{}.",
    layer=(
        *both("input_layernorm", "layer_norm1"),
        *both("self_attention.linear_qkv", "self_attn.q_proj self_attn.k_proj self_attn.v_proj", QKV),
        *both("self_attention.linear_proj", "self_attn.out_proj"),
        *both("pre_mlp_layernorm", "layer_norm2"),
        *both("mlp.linear_fc1", "mlp.fc1"),
        *both("mlp.linear_fc2", "mlp.fc2"),
    ),
    rest=(
        row("class_embedding", "embeddings.class_embedding"),
        *both("conv1", "embeddings.patch_embedding"),
        row("positional_embedding", "embeddings.position_embedding.weight"),
        *both("ln_pre", "pre_layrnorm"),  # the slip is in the published names
        *both("ln_post", "post_layernorm"),
    ),
    aside=(
        Aside(r"embeddings\.position_ids", "position number buffer"),
        Aside(r"post_layernorm\.(weight|bias)", "norm behind layers that are not used", carried=True),
        Aside(r"encoder\.layers\.\d+\..*", "layer behind the one whose features are taken", carried=True),
        Aside(r"head\..*", "attention pooling head", carried=True),
    ),
    prefix="vision_model.",
)
"""CLIP and SigLIP as Transformers writes them."""

RESAMPLER = Table(
    part="connector",
    rest=(
        row("query", "attn_pool.query"),
        row("pos_embed", "attn_pool.pos_embed"),
        row("kv_proj.weight", "attn_pool.kv_proj.weight"),
        row("linear_q.weight linear_k.weight linear_v.weight", "attn_pool.attn.in_proj_weight", SPLIT3),
        row("linear_q.bias linear_k.bias linear_v.bias", "attn_pool.attn.in_proj_bias", SPLIT3),
        *both("out_proj", "attn_pool.attn.out_proj"),
        *both("ln_q", "attn_pool.ln_q"),
        *both("ln_kv", "attn_pool.ln_kv"),
        *both("ln_post", "ln_post"),
        row("proj.weight", "proj", TRANSPOSE),
    ),
    prefix="transformer.visual.",
)
"""Qwen-VL's resampler, with the norm and projection behind it."""

LLAVA_PROJECTOR = Table(
    part="connector",
    rest=(*both("layers.0", "linear_1"), *both("layers.1", "linear_2")),
    prefix="multi_modal_projector.",
)
"""LLaVA's two layers, as Transformers calls them."""

SEQUENTIAL_PROJECTOR = Table(
    part="connector",
    # GELUs stand between the layers and take a number each; one layer alone has none.
    rest=tuple(one for n in range(99) for one in both(f"layers.{n}", f"{2 * n}")),
    prefix="transformer.mm_projector.",
)
"""``mlpNx_gelu`` of the original LLaVA and of CodeFuse-VLM."""

LINEAR_PROJECTOR = Table(
    part="connector", rest=both("layers.0", "{linear}"), names={"linear": "transformer.mm_projector"}
)
"""``linear`` of the same."""


def need(config: Mapping[str, Any], key: str, where: str) -> Any:
    """Return ``config[key]``.

    Raises:
        UserError: there is no such key.
    """
    if config.get(key) is None:
        raise UserError(f"{where}: has no {key!r}, which the model's shape follows from")
    return config[key]


def number(config: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    """Return the finite number ``config[key]``.

    Raises:
        UserError: it is none, or the key is missing and there is no default.
    """
    value = default if config.get(key) is None else config[key]
    value = need(config, key, where) if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}: {key} is {str(value)[:40]!r}, which is not a number; correct it")
    return value


def expect(config: Mapping[str, Any], where: str, **values: Any) -> None:
    """Check keys that the model here has one value for.

    Raises:
        UserError: a key has another value.
    """
    for key, value in values.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if key in config and config[key] is not None and config[key] not in allowed:
            raise UserError(f"{where}: {key} is {config[key]!r}; only {' or '.join(map(repr, allowed))} is supported")
