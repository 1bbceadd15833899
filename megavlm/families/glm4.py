"""GLM-4-0414's dense language models (``Glm4ForCausalLM``): norms behind branches, half a head turned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megavlm.architectures.decoders.decoder.tables import GLM_LANGUAGE
from megavlm.config.schema import LanguageConfig
from megavlm.families.common import expect, flag
from megavlm.families.family import Tree
from megavlm.families.text_kinds import ANY, TextFamily, TextKind, rotary_percent, shape, shape_config


def _read(config: Mapping[str, Any], where: str) -> Tree:
    expect(config, where, model_type="glm4", hidden_act="silu")
    return {
        **shape({"head_dim": 128, **config}, where, "glm4"),
        "add_qkv_bias": flag(config, "attention_bias", where, default=True),
        "rotary_percent": rotary_percent(config, where, 0.5),
    }


def _write(language: LanguageConfig) -> Tree:
    return {
        **shape_config(language, "glm4", "Glm4ForCausalLM", partial=True),
        "attention_bias": language.add_qkv_bias,
        "head_dim": language.kv_channels,
        "hidden_act": "silu",
        # Its class has a padding token of GLM-4's by default, which a smaller vocabulary lacks.
        "pad_token_id": None,
    }


GLM4 = TextKind(
    model_type="glm4",
    title="GLM-4",
    table=GLM_LANGUAGE,
    read=_read,
    write=_write,
    fixed={"add_qkv_bias": ANY, "post_layernorms": True, "rotary_percent": ANY, "rotary_interleaved": True},
    defaults={
        "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40, "num_attention_heads": 32,
        "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 151552, "max_position_embeddings": 131072,
        "rms_norm_eps": 1.5625e-7,
    },
    layer_names="glm",
)  # fmt: skip


class Glm4Family(TextFamily):
    """GLM-4 alone."""

    name = "glm4"
    title = "GLM-4 (0414, dense) language models"
    kind = GLM4
