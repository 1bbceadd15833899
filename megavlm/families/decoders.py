"""Language models alone: Qwen v1, Llama and Vicuna, Qwen2 and Qwen2.5, Qwen3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megavlm.config.errors import UserError
from megavlm.config.schema import LanguageConfig
from megavlm.families.common import expect, flag, need, number

Tree = dict[str, Any]


def qwen_language(config: Mapping[str, Any], where: str) -> Tree:
    """Return the recipe's ``model.language`` of a Qwen v1 ``config.json``.

    Raises:
        UserError: a key is missing, or has a value that the model here does not know.
    """
    expect(config, where, no_bias=True, rotary_pct=1.0, scale_attn_weights=True)
    heads, hidden = need(config, "num_attention_heads", where), need(config, "hidden_size", where)
    width = config.get("kv_channels") or hidden // heads
    ntk, logn = (flag(config, key, where, default=True) for key in ("use_dynamic_ntk", "use_logn_attn"))
    return {
        "preset": "qwen",
        "num_layers": need(config, "num_hidden_layers", where),
        "hidden_size": hidden,
        "ffn_hidden_size": need(config, "intermediate_size", where) // 2,
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": width,
        "vocab_size": need(config, "vocab_size", where),
        "max_position_embeddings": config.get("max_position_embeddings") or config.get("seq_length", 2048),
        "rotary_base": int(number(config, "rotary_emb_base", where, 10000)),
        "norm_epsilon": config.get("layer_norm_epsilon", 1e-6),
        "add_qkv_bias": True,
        "tie_word_embeddings": flag(config, "tie_word_embeddings", where, default=False),
        "init_method_std": config.get("initializer_range", 0.02),
        "seq_length": config.get("seq_length", 2048) if ntk or logn else None,
        "use_dynamic_ntk": ntk,
        "use_logn_attn": logn,
    }


def qwen_config(language: LanguageConfig) -> Tree:
    """Return the ``config.json`` of a Qwen v1 model."""
    return {
        "architectures": ["QWenLMHeadModel"],
        "attn_dropout_prob": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "emb_dropout_prob": 0.0,
        "hidden_size": language.hidden_size,
        "initializer_range": language.init_method_std,
        "intermediate_size": 2 * language.ffn_hidden_size,
        "kv_channels": language.kv_channels,
        "layer_norm_epsilon": language.norm_epsilon,
        "max_position_embeddings": language.max_position_embeddings,
        "model_type": "qwen",
        "no_bias": True,
        "num_attention_heads": language.num_attention_heads,
        "num_hidden_layers": language.num_layers,
        "rotary_emb_base": language.rotary_base,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": language.seq_length or 2048,
        "tie_word_embeddings": language.tie_word_embeddings,
        "use_dynamic_ntk": language.use_dynamic_ntk,
        "use_logn_attn": language.use_logn_attn,
        "vocab_size": language.vocab_size,
    }


_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def llama_language(config: Mapping[str, Any], where: str) -> Tree:
    """Return the recipe's ``model.language`` of a Llama, Qwen2 or Qwen3 ``config.json``.

    Raises:
        UserError: a key is missing, or has a value that the model here does not know.
    """
    kind = config.get("model_type", "llama")
    expect(
        config, where, model_type=tuple(_ARCHITECTURES), hidden_act="silu", mlp_bias=False, use_sliding_window=False,
        attention_bias=False, pretraining_tp=1, quantization_config=None,
    )  # fmt: skip
    heads, hidden = need(config, "num_attention_heads", where), need(config, "hidden_size", where)
    return {
        "preset": kind,
        "num_layers": need(config, "num_hidden_layers", where),
        "hidden_size": hidden,
        "ffn_hidden_size": need(config, "intermediate_size", where),
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "kv_channels": config.get("head_dim") or (128 if kind == "qwen3" else hidden // heads),
        "vocab_size": need(config, "vocab_size", where),
        "max_position_embeddings": config.get("max_position_embeddings", 2048),
        **rope_branch(config, where),
        "norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "add_qkv_bias": kind == "qwen2",
        "qk_layernorm": kind == "qwen3",
        "tie_word_embeddings": flag(config, "tie_word_embeddings", where, default=False),
        "init_method_std": config.get("initializer_range", 0.02),
    }


def rope_branch(config: Mapping[str, Any], where: str) -> Tree:
    """Return the keys of rotary positions; Transformers 5 has ``rope_parameters``, older ones two keys.

    Positions of M-RoPE are called ``mrope`` by older configurations and ``default`` by newer ones: ``mrope_section``
    tells them from others.
    """
    rope = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta", 10000.0),
        **(config.get("rope_scaling") or {}),
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    base = number(rope, "rope_theta", where, number(config, "rope_theta", where, 10000.0))
    if base != int(base):
        raise UserError(f"{where}: rope_theta {base} is no whole number")
    sections = tuple(rope.get("mrope_section") or ())
    if kind == "mrope" and sections:
        kind = "default"
    expect({"rope_type": kind}, where, rope_type=("default", "linear", "llama3"))
    found: Tree = {"rotary_base": int(base), "rope_scaling": None, "rope_scaling_factor": 1.0}
    if kind == "llama3":
        expect(rope, where, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    if kind != "default":
        found |= {"rope_scaling": kind, "rope_scaling_factor": float(number(rope, "factor", where))}
    part = number(rope, "partial_rotary_factor", where, number(config, "partial_rotary_factor", where, 1.0))
    if part != 1:
        found["rotary_percent"] = float(part)
    if sections:
        found["rotary_sections"] = sections
        found["rotary_sections_interleaved"] = flag(rope, "mrope_interleaved", where, default=False)
    return found


def llama_config(language: LanguageConfig) -> Tree:
    """Return the ``config.json`` of a Llama, Qwen2 or Qwen3 model, with the keys of Transformers 4 and 5."""
    kind = "qwen3" if language.qk_layernorm else "qwen2" if language.add_qkv_bias else "llama"
    rope: Tree = {"rope_theta": float(language.rotary_base), "rope_type": language.rope_scaling or "default"}
    if language.rope_scaling is not None:
        rope["factor"] = language.rope_scaling_factor
    if language.rope_scaling == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if language.rotary_percent != 1:
        rope["partial_rotary_factor"] = language.rotary_percent
    if language.rotary_sections:
        rope["mrope_section"] = list(language.rotary_sections)
    if language.rotary_sections_interleaved:
        rope["mrope_interleaved"] = True
    old = {key: value for key, value in rope.items() if key != "rope_theta"} if len(rope) > 2 else None
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "attention_dropout": 0.0,
        "head_dim": language.kv_channels,
        "hidden_act": "silu",
        "hidden_size": language.hidden_size,
        "initializer_range": language.init_method_std,
        "intermediate_size": language.ffn_hidden_size,
        "max_position_embeddings": language.max_position_embeddings,
        "model_type": kind,
        "num_attention_heads": language.num_attention_heads,
        "num_hidden_layers": language.num_layers,
        "num_key_value_heads": language.num_query_groups,
        "rms_norm_eps": language.norm_epsilon,
        "rope_parameters": rope,
        "rope_scaling": old,
        "rope_theta": float(language.rotary_base),
        "tie_word_embeddings": language.tie_word_embeddings,
        "vocab_size": language.vocab_size,
    }


def with_numbers(text: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return a language model's configuration, which says what its class has another default for than a Llama's.

    Raises:
        UserError: it does not.
    """
    need(text, "rms_norm_eps", where)
    if not text.get("rope_parameters"):
        need(text, "rope_theta", where)
    return text
