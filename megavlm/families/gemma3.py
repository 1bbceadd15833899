"""Gemma 3's language model (``Gemma3ForCausalLM``): windows of a pattern, two rotary bases, norms behind branches.

With pictures it is :mod:`megavlm.families.gemma3_vl`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megavlm.architectures.decoders.decoder.tables import GEMMA3_LANGUAGE
from megavlm.config.errors import UserError
from megavlm.config.schema import LanguageConfig
from megavlm.families.common import expect, flag, need, number
from megavlm.families.family import Tree
from megavlm.families.text_kinds import ANY, TextFamily, TextKind, shape, shape_config

_LOCAL, _WHOLE = "sliding_attention", "full_attention"


def _read(config: Mapping[str, Any], where: str) -> Tree:
    expect(config, where, model_type="gemma3_text", hidden_activation="gelu_pytorch_tanh", attention_bias=False,
           use_bidirectional_attention=False, final_logit_softcapping=None, attn_logit_softcapping=None)  # fmt: skip
    rope, local = _ropes(config, where)
    own = shape({**config, "rope_parameters": rope, "rope_scaling": None}, where, "gemma3_text")
    window = config.get("sliding_window", 4096)
    return {
        **own,
        "kv_channels": config.get("head_dim") or 256,
        "tie_word_embeddings": flag(config, "tie_word_embeddings", where, default=True),
        "embedding_multiplier": math.sqrt(own["hidden_size"]),
        "query_pre_attn_scalar": float(number(config, "query_pre_attn_scalar", where, 256)),
        "sliding_window": window,
        "sliding_window_pattern": _pattern(config, need(own, "num_layers", where), where),
        "rope_local_base_freq": int(local),
    }


def _ropes(config: Mapping[str, Any], where: str) -> tuple[Tree, float]:
    """Return the rotary keys of layers without a window, and the base of those with one.

    Transformers 5 has both in ``rope_parameters``, by the kind of the layer; older versions keys of their own.
    """
    both = config.get("rope_parameters")
    if both is None:
        whole = {"rope_type": "default", **(config.get("rope_scaling") or {})}
        whole["rope_theta"] = number(config, "rope_theta", where, 1_000_000)
        return whole, number(config, "rope_local_base_freq", where, 10_000)
    local = need(both, _LOCAL, where)
    expect(local, where, rope_type="default")
    return dict(need(both, _WHOLE, where)), number(local, "rope_theta", where, 10_000)


def _pattern(config: Mapping[str, Any], layers: int, where: str) -> int:
    """Return after how many layers one has no window.

    Raises:
        UserError: the layers follow no such pattern.
    """
    kinds = config.get("layer_types")
    pattern = config.get("sliding_window_pattern", config.get("_sliding_window_pattern"))
    if kinds is None:
        return int(number({"sliding_window_pattern": pattern}, "sliding_window_pattern", where, 6))
    found = kinds.index(_WHOLE) + 1 if _WHOLE in kinds else layers + 1
    wanted = [_WHOLE if number % found == 0 else _LOCAL for number in range(1, layers + 1)]
    if found < 2 or kinds != wanted:
        raise UserError(
            f"{where}: layer_types has {_WHOLE} at other layers than every so manieth; that is not supported"
        )
    return found


def _write(language: LanguageConfig) -> Tree:
    own = shape_config(language, "gemma3_text", "Gemma3ForCausalLM")
    own["rope_parameters"] = {
        _WHOLE: own["rope_parameters"],
        _LOCAL: {"rope_type": "default", "rope_theta": float(language.rope_local_base_freq)},
    }
    every = language.sliding_window_pattern
    return {
        **own,
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": language.kv_channels,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": [_LOCAL if number % every else _WHOLE for number in range(1, language.num_layers + 1)],
        # Transformers takes a whole number here.
        "query_pre_attn_scalar": int(scalar) if (scalar := language.query_pre_attn_scalar) % 1 == 0 else scalar,
        "rope_local_base_freq": float(language.rope_local_base_freq),
        "sliding_window": language.sliding_window,
        "sliding_window_pattern": every,
        "use_bidirectional_attention": False,
    }


def _narrow(language: LanguageConfig) -> str | None:
    missing = [
        key
        for key in ("sliding_window", "sliding_window_pattern", "rope_local_base_freq", "query_pre_attn_scalar")
        if getattr(language, key, None) is None
    ]
    return f"the language model has no {missing[0]}, which that of Gemma 3 has" if missing else None


GEMMA3 = TextKind(
    model_type="gemma3_text",
    title="Gemma 3",
    table=GEMMA3_LANGUAGE,
    read=_read,
    write=_write,
    fixed={
        "layernorm_zero_centered_gamma": True, "activation": "gelu_tanh", "post_layernorms": True,
        "qk_layernorm": True, "sliding_window": ANY, "sliding_window_pattern": ANY, "rope_local_base_freq": ANY,
        "query_pre_attn_scalar": ANY, "embedding_multiplier": lambda language: math.sqrt(language.hidden_size),
    },
    narrow=_narrow,
    defaults={
        "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
    },
    templates=("gemma",),
)  # fmt: skip


class Gemma3TextFamily(TextFamily):
    """Gemma 3's language model alone."""

    name = "gemma3_text"
    title = "Gemma 3 language models (text alone: 1B)"
    kind = GEMMA3
