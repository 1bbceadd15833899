"""Language models whose layers have experts: Qwen3-MoE and Mixtral, as Transformers has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megavlm.architectures.decoders.decoder.tables import MIXTRAL_LANGUAGE, QWEN3_MOE_LANGUAGE
from megavlm.config.errors import UserError
from megavlm.config.schema import LanguageConfig
from megavlm.families.common import expect, flag, need, number
from megavlm.families.family import Tree
from megavlm.families.text_kinds import ANY, TextFamily, TextKind, shape, shape_config

_PLAIN_ROUTER: Tree = {
    "moe_router_score_function": "softmax", "moe_router_num_groups": None, "moe_router_enable_expert_bias": False,
    "moe_shared_expert_intermediate_size": None,
}  # fmt: skip
"""What the routers of both have one value for, and DeepSeek's and GLM's another."""


def experts_branch(
    config: Mapping[str, Any], where: str, *, experts: int | None = None, normalised: bool | None = None
) -> Tree:
    """Return the keys of experts of a Qwen3-MoE ``config.json``.

    Args:
        config: of the language model; Transformers 5 calls ``num_experts`` ``num_local_experts``.
        where: its file, for messages.
        experts: of a layer, where it says nothing of them; None where it has to.
        normalised: whether the scores of the chosen experts add up to 1; None where ``norm_topk_prob`` says it.

    Raises:
        UserError: a key is missing or wrong, or no layer has experts.
    """
    count = _number_of_experts(config, where, experts)
    layers = need(config, "num_hidden_layers", where)
    step, dense = number(config, "decoder_sparse_step", where, 1), config.get("mlp_only_layers") or []
    if not isinstance(dense, list | tuple) or any(type(one) is not int or not 0 <= one < layers for one in dense):
        raise UserError(f"{where}: mlp_only_layers is {dense!r}; it lists numbers of layers, 0 to {layers - 1}")
    if step < 1 or step != int(step):
        raise UserError(f"{where}: decoder_sparse_step is {step:g}; give a whole number from 1 on")
    plan = tuple(int(layer not in dense and (layer + 1) % step == 0) for layer in range(layers))
    if not any(plan):
        raise UserError(
            f"{where}: decoder_sparse_step {step:g} and mlp_only_layers {dense} leave none of {layers} layers with"
            " experts; a dense Qwen3 has the model_type qwen3"
        )
    if normalised is None:
        normalised = flag(config, "norm_topk_prob", where, default=False)
    return {
        "num_moe_experts": count,
        "moe_ffn_hidden_size": need(config, "moe_intermediate_size", where),
        "moe_layer_freq": 1 if all(plan) else plan,
        "moe_router_topk": chosen_experts(config, count, where),
        "moe_router_pre_softmax": not normalised,
    }


def _number_of_experts(config: Mapping[str, Any], where: str, default: int | None) -> int:
    old, new = config.get("num_experts"), config.get("num_local_experts")
    if old is not None and new is not None and old != new:
        raise UserError(f"{where}: num_experts is {old} and num_local_experts {new}; correct one of them")
    said = new if old is None else old
    count = need({"num_experts": default if said is None else said}, "num_experts", where)
    if isinstance(count, bool) or not isinstance(count, int) or count < 2:
        raise UserError(f"{where}: num_experts is {count!r}; a mixture has at least 2")
    return count


def chosen_experts(config: Mapping[str, Any], count: int, where: str) -> int:
    """Return ``num_experts_per_tok``, of ``count`` experts.

    Raises:
        UserError: it is missing or wrong.
    """
    chosen = need(config, "num_experts_per_tok", where)
    if isinstance(chosen, bool) or not isinstance(chosen, int) or not 0 < chosen <= count:
        raise UserError(f"{where}: num_experts_per_tok is {chosen!r}; choose 1 to {count}, the experts of a layer")
    return chosen


def experts_config(language: LanguageConfig) -> Tree:
    """Return the keys of experts of a Qwen3-MoE ``config.json``, but ``norm_topk_prob``."""
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, here in enumerate(language.expert_layers) if not here],
        "moe_intermediate_size": language.expert_width,
        "num_experts": language.num_moe_experts,
        "num_experts_per_tok": language.moe_router_topk,
        "output_router_logits": False,
        # Of the loss over all layers together, which only a training by Transformers takes.
        "router_aux_loss_coef": 0.001,
    }


def other_experts(language: LanguageConfig) -> str | None:
    """Return why a language model's experts are not of Qwen3-MoE's and Mixtral's kind, or None."""
    if language.num_moe_experts is None:
        return "the language model has no experts"
    for key, wanted in _PLAIN_ROUTER.items():
        if (there := getattr(language, key)) != wanted:
            return f"the language model's {key} is {there!r}, and Qwen3-MoE and Mixtral have {wanted!r}"
    if language.moe_router_topk_scaling_factor not in (None, 1):
        return f"the language model's scores are multiplied by {language.moe_router_topk_scaling_factor:g}"
    return None


def _read_qwen3_moe(config: Mapping[str, Any], where: str) -> Tree:
    expect(config, where, model_type="qwen3_moe", hidden_act="silu", attention_bias=False, use_sliding_window=False)
    return {**shape(config, where, "qwen3_moe"), **experts_branch(config, where, experts=128)}


def _write_qwen3_moe(language: LanguageConfig) -> Tree:
    return {
        **shape_config(language, "qwen3_moe", "Qwen3MoeForCausalLM"),
        **experts_config(language),
        "attention_bias": False,
        "head_dim": language.kv_channels,
        "hidden_act": "silu",
        "norm_topk_prob": not language.moe_router_pre_softmax,
        "sliding_window": None,
        "use_sliding_window": False,
    }


def _read_mixtral(config: Mapping[str, Any], where: str) -> Tree:
    expect(config, where, model_type="mixtral", hidden_act="silu", router_jitter_noise=0.0)
    count = _number_of_experts(config, where, 8)
    return {
        **shape({"rope_theta": 1e6, **config}, where, "mixtral"),
        "sliding_window": config.get("sliding_window"),
        "num_moe_experts": count,
        "moe_router_topk": chosen_experts({"num_experts_per_tok": 2, **config}, count, where),
    }


def _write_mixtral(language: LanguageConfig) -> Tree:
    return {
        **shape_config(language, "mixtral", "MixtralForCausalLM"),
        "head_dim": language.kv_channels,
        "hidden_act": "silu",
        "intermediate_size": language.expert_width,
        "num_experts_per_tok": language.moe_router_topk,
        "num_local_experts": language.num_moe_experts,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "sliding_window": language.sliding_window,
    }


def _no_mixtral(language: LanguageConfig) -> str | None:
    if reason := other_experts(language):
        return reason
    if not all(language.expert_layers):
        return "the language model has layers without experts, Mixtral has none"
    if language.expert_width != language.ffn_hidden_size:
        return "the language model's moe_ffn_hidden_size is not its ffn_hidden_size; Mixtral has one width"
    if language.moe_router_pre_softmax:
        return "the language model's scores are those of a softmax over all experts, Mixtral's of one over the chosen"
    return None


QWEN3_MOE = TextKind(
    "qwen3_moe", "Qwen3-MoE", QWEN3_MOE_LANGUAGE, _read_qwen3_moe, _write_qwen3_moe,
    {"qk_layernorm": True, "num_moe_experts": ANY}, other_experts,
    defaults={
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 151936, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
        "moe_intermediate_size": 768, "num_experts_per_tok": 8,
    },
    templates=("qwen2",),
)  # fmt: skip
MIXTRAL = TextKind(
    "mixtral", "Mixtral", MIXTRAL_LANGUAGE, _read_mixtral, _write_mixtral,
    {"sliding_window": ANY, "num_moe_experts": ANY}, _no_mixtral,
    defaults={
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    },
    templates=("mistral",),
)  # fmt: skip


class Qwen3MoeFamily(TextFamily):
    """Qwen3-MoE alone."""

    name = "qwen3_moe"
    title = "Qwen3-MoE language models"
    kind = QWEN3_MOE


class MixtralFamily(TextFamily):
    """Mixtral alone."""

    name = "mixtral"
    title = "Mixtral language models"
    kind = MIXTRAL
