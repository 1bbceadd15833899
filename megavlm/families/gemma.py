"""Gemma (v1): norms around 1, GeGLU, embeddings times the root of their width."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megavlm.architectures.decoders.decoder.tables import LLAMA_LANGUAGE
from megavlm.config.schema import LanguageConfig
from megavlm.families.common import expect, flag
from megavlm.families.family import Tree
from megavlm.families.text_kinds import TextFamily, TextKind, shape, shape_config


def _read(config: Mapping[str, Any], where: str) -> Tree:
    # "gelu" stands for the tanh form: Transformers' configuration_gemma.py says so of the first releases.
    expect(config, where, model_type="gemma", hidden_act=("gelu_pytorch_tanh", "gelu"),
           hidden_activation="gelu_pytorch_tanh", attention_bias=False, use_bidirectional_attention=False)  # fmt: skip
    own = shape({"head_dim": 256, **config}, where, "gemma")
    return {
        **own,
        "tie_word_embeddings": flag(config, "tie_word_embeddings", where, default=True),
        "embedding_multiplier": _multiplier(own["hidden_size"]),
    }


def _multiplier(hidden: int) -> float:
    return math.sqrt(hidden)


def _write(language: LanguageConfig) -> Tree:
    return {
        **shape_config(language, "gemma", "GemmaForCausalLM"),
        "attention_bias": False,
        "head_dim": language.kv_channels,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
    }


GEMMA = TextKind(
    model_type="gemma",
    title="Gemma",
    table=LLAMA_LANGUAGE,
    read=_read,
    write=_write,
    fixed={
        "layernorm_zero_centered_gamma": True, "activation": "gelu_tanh",
        "embedding_multiplier": lambda language: _multiplier(language.hidden_size),
    },
    defaults={
        "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 16, "head_dim": 256, "vocab_size": 256000, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
    },
    templates=("gemma",),
)  # fmt: skip


class GemmaFamily(TextFamily):
    """Gemma alone."""

    name = "gemma"
    title = "Gemma (v1) language models"
    kind = GEMMA
