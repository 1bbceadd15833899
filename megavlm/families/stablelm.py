"""StableLM-2: LayerNorm, a quarter of each head turned, biases on QKV."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megavlm.architectures.decoders.decoder.tables import LLAMA_LANGUAGE
from megavlm.config.schema import LanguageConfig
from megavlm.families.common import expect, flag
from megavlm.families.family import Tree
from megavlm.families.text_kinds import ANY, TextFamily, TextKind, odd_heads, rotary_percent, shape, shape_config


def _read(config: Mapping[str, Any], where: str) -> Tree:
    expect(config, where, model_type="stablelm", hidden_act="silu", qk_layernorm=False, hidden_dropout=0.0)
    return {
        **shape(config, where, "stablelm", epsilon="layer_norm_eps"),
        "rotary_percent": rotary_percent(config, where, 0.25),
        "add_qkv_bias": flag(config, "use_qkv_bias", where, default=False),
        "use_parallel_residual": flag(config, "use_parallel_residual", where, default=False),
    }


def _write(language: LanguageConfig) -> Tree:
    return {
        **shape_config(language, "stablelm", "StableLmForCausalLM", epsilon="layer_norm_eps", partial=True),
        "hidden_act": "silu",
        "hidden_dropout": 0.0,
        "qk_layernorm": False,
        "use_parallel_residual": language.use_parallel_residual,
        "use_qkv_bias": language.add_qkv_bias,
    }


STABLELM = TextKind(
    model_type="stablelm",
    title="StableLM",
    table=LLAMA_LANGUAGE,
    read=_read,
    write=_write,
    fixed={
        "normalization": "LayerNorm", "rotary_percent": ANY, "add_qkv_bias": ANY, "use_parallel_residual": ANY,
    },
    narrow=odd_heads,
    defaults={
        "hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 50304, "max_position_embeddings": 4096, "layer_norm_eps": 1e-5,
    },
    templates=("vicuna_v1_endoftext",),
)  # fmt: skip


class StableLMFamily(TextFamily):
    """StableLM-2 alone."""

    name = "stablelm"
    title = "StableLM-2 language models"
    kind = STABLELM
