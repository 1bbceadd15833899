"""DeepSeek-V2's language models (``DeepseekV2ForCausalLM``): latent attention, many experts, some for every token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megavlm.architectures.decoders.decoder.tables import DEEPSEEK_LANGUAGE
from megavlm.config.errors import UserError
from megavlm.config.schema import LanguageConfig
from megavlm.families.common import expect, need, number
from megavlm.families.experts import chosen_experts
from megavlm.families.family import Tree
from megavlm.families.text_kinds import ANY, TextFamily, TextKind, shape, shape_config

_ROUTER: Tree = {
    "moe_router_score_function": "softmax", "moe_router_pre_softmax": True, "moe_router_enable_expert_bias": False,
    "moe_shared_expert_gate": False,
}  # fmt: skip


def _whole(config: Mapping[str, Any], key: str, where: str, least: int = 1, most: int | None = None) -> int:
    """Return a whole number of a ``config.json``.

    Raises:
        UserError: it is missing, or none of these.
    """
    value = need(config, key, where)
    if type(value) is not int or value < least or (most is not None and value > most):
        raise UserError(f"{where}: {key} is {value!r}; it is {least} to {most or 'any number above'}")
    return value


def _attention(config: Mapping[str, Any], where: str) -> Tree:
    """Return the keys of latent attention."""
    if "q_lora_rank" not in config:
        raise UserError(f"{where}: has no 'q_lora_rank', which the model's shape follows from; null is for none")
    free, turned = (_whole(config, f"qk_{part}_head_dim", where) for part in ("nope", "rope"))
    queries = None if config["q_lora_rank"] is None else _whole(config, "q_lora_rank", where)
    return {
        "kv_channels": free + turned,
        "rotary_percent": part_of(turned, free + turned),
        "kv_lora_rank": _whole(config, "kv_lora_rank", where),
        "q_lora_rank": queries,
        "v_head_dim": _whole(config, "v_head_dim", where),
    }


def part_of(channels: int, width: int) -> float:
    """Return the part of a head that so many of its channels are: what it is multiplied by is cut off behind."""
    part = channels / width
    return part if int(width * part) == channels else math.nextafter(part, 1)


def _experts(config: Mapping[str, Any], where: str) -> Tree:
    """Return the keys of experts."""
    expect(
        config, where, norm_topk_prob=False, scoring_func="softmax", moe_layer_freq=1,
        topk_method=("greedy", "group_limited_greedy"),
    )  # fmt: skip
    count, width = _whole(config, "n_routed_experts", where, 2), _whole(config, "moe_intermediate_size", where)
    layers = _whole(config, "num_hidden_layers", where)
    dense = _whole({"first_k_dense_replace": 0, **config}, "first_k_dense_replace", where, 0, layers - 1)
    shared = _whole(config, "n_shared_experts", where)
    top = chosen_experts(config, count, where)
    factor = float(number(config, "routed_scaling_factor", where, 1.0))
    return {
        **_ROUTER,  # a checkpoint's record says each, also what the preset has
        "num_moe_experts": count,
        "moe_ffn_hidden_size": width,
        "moe_layer_freq": 1 if not dense else (*(0,) * dense, *(1,) * (layers - dense)),
        "moe_router_topk": top,
        **_groups(config, top, where),
        "moe_router_topk_scaling_factor": None if factor == 1 else factor,
        "moe_shared_expert_intermediate_size": shared * width,
    }


def _groups(config: Mapping[str, Any], top: int, where: str) -> Tree:
    """Return the groups that experts are chosen from, if they are."""
    if config.get("topk_method", "greedy") == "greedy":
        return {"moe_router_num_groups": None, "moe_router_group_topk": None}
    groups, best = _whole(config, "n_group", where), _whole(config, "topk_group", where)
    if top != best:
        raise UserError(
            f"{where}: {top} experts of {best} groups (num_experts_per_tok, topk_group): here a group's score is the"
            " sum of as many of its experts as are taken of each, and in DeepSeek-V2 that of its best one; they are"
            " the same where as many groups as experts are chosen"
        )
    return {"moe_router_num_groups": groups, "moe_router_group_topk": best}


def _experts_config(language: LanguageConfig) -> Tree:
    grouped = language.moe_router_num_groups is not None
    return {
        "first_k_dense_replace": list(language.expert_layers).index(True),
        "moe_intermediate_size": language.expert_width,
        "moe_layer_freq": 1,
        "n_group": language.moe_router_num_groups or 1,
        "n_routed_experts": language.num_moe_experts,
        "n_shared_experts": language.moe_shared_expert_intermediate_size // language.expert_width,
        "norm_topk_prob": False,
        "num_experts_per_tok": language.moe_router_topk,
        "routed_scaling_factor": float(language.moe_router_topk_scaling_factor or 1),
        "scoring_func": "softmax",
        "topk_group": language.moe_router_group_topk or 1,
        "topk_method": "group_limited_greedy" if grouped else "greedy",
    }


def _no_deepseek(language: LanguageConfig) -> str | None:
    """Return why a language model is not of DeepSeek-V2's kind, or None."""
    if language.num_moe_experts is None:
        return "the language model has no experts"
    if language.kv_lora_rank is None:
        return "the language model's keys and values are made of no latent (kv_lora_rank)"
    for key, wanted in _ROUTER.items():
        if (there := getattr(language, key)) != wanted:
            return f"the language model's {key} is {there!r}, and DeepSeek-V2 has {wanted!r}"
    if language.rope_scaling is not None:
        return f"the language model's positions are stretched as {language.rope_scaling}, DeepSeek-V2's as yarn or not"
    layers = list(language.expert_layers)
    if not all(layers[layers.index(True) :]):
        return (
            "layers without experts (moe_layer_freq) stand behind such with experts; in DeepSeek-V2 they are the first"
        )
    shared = language.moe_shared_expert_intermediate_size
    if shared is None or shared % language.expert_width:
        return (
            f"the language model's shared experts are {shared} wide (moe_shared_expert_intermediate_size), in"
            f" DeepSeek-V2 a number of times as wide as the others ({language.expert_width})"
        )
    if language.moe_router_num_groups is not None and language.moe_router_topk != language.moe_router_group_topk:
        return (
            f"{language.moe_router_topk} experts of {language.moe_router_group_topk} groups are chosen by sums of"
            " scores, in DeepSeek-V2 by the best of each"
        )
    return None


def _read(config: Mapping[str, Any], where: str) -> Tree:
    expect(
        config, where, model_type="deepseek_v2", hidden_act="silu", attention_bias=False, mlp_bias=False, use_mla=True,
        rope_scaling=None,
    )  # fmt: skip
    expect(config.get("rope_parameters") or {}, f"{where}: rope_parameters", rope_type="default")
    heads = need(config, "num_attention_heads", where)
    expect(config, where, num_key_value_heads=heads)
    return {**shape(config, where, "deepseek_v2"), **_attention(config, where), **_experts(config, where)}


def _write(language: LanguageConfig) -> Tree:
    turned = language.rotary_channels
    return {
        **shape_config(language, "deepseek_v2", "DeepseekV2ForCausalLM"),
        **_experts_config(language),
        "attention_bias": False,
        "hidden_act": "silu",
        "kv_lora_rank": language.kv_lora_rank,
        "mlp_bias": False,
        "q_lora_rank": language.q_lora_rank,
        "qk_nope_head_dim": language.kv_channels - turned,
        "qk_rope_head_dim": turned,
        "v_head_dim": language.v_head_dim,
    }


DEEPSEEK_V2 = TextKind(
    "deepseek_v2", "DeepSeek-V2", DEEPSEEK_LANGUAGE, _read, _write,
    {"rotary_interleaved": True, "rotary_percent": ANY, "num_moe_experts": ANY, "kv_lora_rank": ANY}, _no_deepseek,
    defaults={
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 102400, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1407, "first_k_dense_replace": 0,
    },
)  # fmt: skip


class DeepseekV2Family(TextFamily):
    """DeepSeek-V2 alone."""

    name = "deepseek_v2"
    title = "DeepSeek-V2 language models"
    kind = DEEPSEEK_V2
