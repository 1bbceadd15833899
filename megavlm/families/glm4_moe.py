"""GLM-4.5's language models (``Glm4MoeForCausalLM``): many experts, one for every token, MLPs in the first layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megavlm.architectures.decoders.decoder.tables import GLM_MOE_LANGUAGE
from megavlm.config.errors import UserError
from megavlm.config.schema import LanguageConfig
from megavlm.families.common import expect, flag, need, number
from megavlm.families.experts import chosen_experts
from megavlm.families.family import Tree
from megavlm.families.text_kinds import ANY, TextFamily, TextKind, rotary_percent, shape, shape_config

_BEST_OF_GROUP = 2
"""Experts whose scores a group's is the sum of: its code has no key for it."""
_ROUTER: Tree = {
    "moe_router_score_function": "sigmoid", "moe_router_pre_softmax": False, "moe_router_enable_expert_bias": True,
    "moe_shared_expert_gate": False,
}  # fmt: skip


def glm_experts_branch(config: Mapping[str, Any], where: str) -> Tree:
    """Return the keys of experts of a GLM-4.5 ``config.json``.

    Raises:
        UserError: a key is missing or wrong, or no layer has experts.
    """
    expect(config, where, norm_topk_prob=True, scoring_func="sigmoid", topk_method="noaux_tc")
    count, width = need(config, "n_routed_experts", where), need(config, "moe_intermediate_size", where)
    layers = need(config, "num_hidden_layers", where)
    dense, shared = need(config, "first_k_dense_replace", where), need(config, "n_shared_experts", where)
    for key, value, least, most in (
        ("n_routed_experts", count, 2, None), ("moe_intermediate_size", width, 1, None),
        ("num_hidden_layers", layers, 1, None), ("first_k_dense_replace", dense, 0, layers - 1),
        ("n_shared_experts", shared, 1, None),
    ):  # fmt: skip
        if type(value) is not int or value < least or (most is not None and value > most):
            raise UserError(f"{where}: {key} is {value!r}; it is {least} to {most or 'any number above'}")
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
    """Return the groups that experts are chosen from; one is none."""
    groups, best = number(config, "n_group", where, 1), number(config, "topk_group", where, 1)
    if groups == 1:
        expect(config, where, topk_group=(None, 1))
        return {"moe_router_num_groups": None, "moe_router_group_topk": None}
    if top != best * _BEST_OF_GROUP:
        raise UserError(
            f"{where}: {top} experts of {best} groups (num_experts_per_tok, topk_group): here a group's score is the"
            f" sum of as many of its experts as are taken of each, and in GLM-4.5 of {_BEST_OF_GROUP}"
        )
    return {"moe_router_num_groups": groups, "moe_router_group_topk": best}


def glm_experts_config(language: LanguageConfig) -> Tree:
    """Return the keys of experts of a GLM-4.5 ``config.json``."""
    return {
        "first_k_dense_replace": list(language.expert_layers).index(True),
        "moe_intermediate_size": language.expert_width,
        "n_group": language.moe_router_num_groups or 1,
        "n_routed_experts": language.num_moe_experts,
        "n_shared_experts": language.moe_shared_expert_intermediate_size // language.expert_width,
        "norm_topk_prob": True,
        "num_experts_per_tok": language.moe_router_topk,
        "routed_scaling_factor": float(language.moe_router_topk_scaling_factor or 1),
        "topk_group": language.moe_router_group_topk or 1,
    }


def no_glm_experts(language: LanguageConfig) -> str | None:
    """Return why a language model's experts are not of GLM-4.5's kind, or None."""
    if language.num_moe_experts is None:
        return "the language model has no experts"
    for key, wanted in _ROUTER.items():
        if (there := getattr(language, key)) != wanted:
            return f"the language model's {key} is {there!r}, and GLM-4.5 has {wanted!r}"
    layers = list(language.expert_layers)
    if not all(layers[layers.index(True) :]):
        return "layers without experts (moe_layer_freq) stand behind such with experts; in GLM-4.5 they are the first"
    shared = language.moe_shared_expert_intermediate_size
    if shared is None or shared % language.expert_width:
        return (
            f"the language model's shared experts are {shared} wide (moe_shared_expert_intermediate_size), in GLM-4.5 a"
            f" number of times as wide as the others ({language.expert_width})"
        )
    groups, best = language.moe_router_num_groups, language.moe_router_group_topk
    if groups is not None and language.moe_router_topk != best * _BEST_OF_GROUP:
        return f"{language.moe_router_topk} experts of {best} groups are chosen, in GLM-4.5 {_BEST_OF_GROUP} of each"
    if language.moe_router_topk == 1:
        return "one expert is chosen, whose score is 1 in GLM-4.5 (norm_topk_prob), and its own here"
    return None


def _read(config: Mapping[str, Any], where: str) -> Tree:
    expect(config, where, model_type="glm4_moe", hidden_act="silu")
    if number(config, "num_experts_per_tok", where, 8) == 1:
        raise UserError(f"{where}: num_experts_per_tok is 1, whose score is 1 in GLM-4.5, and its own here; take 2")
    return {
        **shape(config, where, "glm4_moe"),
        **glm_experts_branch(config, where),
        "add_qkv_bias": flag(config, "attention_bias", where, default=False),
        "qk_layernorm": flag(config, "use_qk_norm", where, default=False),
        "rotary_percent": rotary_percent(config, where, 0.5),
    }


def _write(language: LanguageConfig) -> Tree:
    return {
        **shape_config(language, "glm4_moe", "Glm4MoeForCausalLM", partial=True),
        **glm_experts_config(language),
        "attention_bias": language.add_qkv_bias,
        "head_dim": language.kv_channels,
        "hidden_act": "silu",
        "use_qk_norm": language.qk_layernorm,
    }


GLM4_MOE = TextKind(
    "glm4_moe", "GLM-4.5", GLM_MOE_LANGUAGE, _read, _write,
    {"add_qkv_bias": ANY, "qk_layernorm": ANY, "rotary_percent": ANY, "num_moe_experts": ANY}, no_glm_experts,
    defaults={
        "hidden_size": 4096, "intermediate_size": 10944, "num_hidden_layers": 46, "num_attention_heads": 96,
        "num_key_value_heads": 8, "vocab_size": 151552, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "moe_intermediate_size": 1408, "num_experts_per_tok": 8, "n_shared_experts": 1,
        "n_routed_experts": 128, "first_k_dense_replace": 1,
    },
)  # fmt: skip


class Glm4MoeFamily(TextFamily):
    """GLM-4.5 alone."""

    name = "glm4_moe"
    title = "GLM-4.5 language models"
    kind = GLM4_MOE
