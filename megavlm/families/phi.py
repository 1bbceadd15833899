"""Phi-1.5 and Phi-2, and Phi-3: two kinds of language models that share a name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megavlm.architectures.decoders.decoder.tables import PHI3_LANGUAGE, PHI_LANGUAGE
from megavlm.config.schema import LanguageConfig
from megavlm.families.common import expect, flag, number
from megavlm.families.family import Tree
from megavlm.families.text_kinds import ANY, TextFamily, TextKind, odd_heads, rotary_percent, shape, shape_config


def _read_phi(config: Mapping[str, Any], where: str) -> Tree:
    expect(config, where, model_type="phi", hidden_act=("gelu_new", "gelu_pytorch_tanh"), embd_pdrop=0.0)
    number(config, "resid_pdrop", where, 0.0)  # Phi-2 has 0.1, which only a training would see; here there is none
    tied = flag(config, "tie_word_embeddings", where, default=False)
    expect({"tie_word_embeddings": tied}, where, tie_word_embeddings=False)
    return {
        **shape(config, where, "phi", epsilon="layer_norm_eps"),
        "rotary_percent": rotary_percent(config, where, 0.5),
        "qk_layernorm": flag(config, "qk_layernorm", where, default=False),
    }


def _write_phi(language: LanguageConfig) -> Tree:
    return {
        **shape_config(language, "phi", "PhiForCausalLM", epsilon="layer_norm_eps", partial=True),
        "embd_pdrop": 0.0,
        "hidden_act": "gelu_new",
        "qk_layernorm": language.qk_layernorm,
        "resid_pdrop": 0.0,
    }


PHI = TextKind(
    model_type="phi",
    title="Phi-1.5 and Phi-2",
    table=PHI_LANGUAGE,
    read=_read_phi,
    write=_write_phi,
    fixed={
        "add_qkv_bias": True, "add_bias_linear": True, "lm_head_bias": True, "normalization": "LayerNorm",
        "gated_linear_unit": False, "activation": "gelu_tanh", "use_parallel_residual": True, "rotary_percent": ANY,
        "qk_layernorm": ANY,
    },
    narrow=odd_heads,
    defaults={
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
        "vocab_size": 51200, "max_position_embeddings": 2048, "layer_norm_eps": 1e-5,
    },
    templates=("vicuna_v1_endoftext",),
    layer_names="phi",
)  # fmt: skip


def _read_phi3(config: Mapping[str, Any], where: str) -> Tree:
    expect(config, where, model_type="phi3", hidden_act="silu", resid_pdrop=0.0, embd_pdrop=0.0)
    return {
        **shape(config, where, "phi3"),
        "rotary_percent": rotary_percent(config, where, 1.0),
        "sliding_window": config.get("sliding_window"),
    }


def _write_phi3(language: LanguageConfig) -> Tree:
    return {
        **shape_config(language, "phi3", "Phi3ForCausalLM", partial=True),
        "embd_pdrop": 0.0,
        "hidden_act": "silu",
        # Its configuration has tokens of Phi-3's by default, which a smaller vocabulary lacks.
        "original_max_position_embeddings": language.max_position_embeddings,
        "pad_token_id": None,
        "resid_pdrop": 0.0,
        "sliding_window": language.sliding_window,
    }


PHI3 = TextKind(
    model_type="phi3",
    title="Phi-3",
    table=PHI3_LANGUAGE,
    read=_read_phi3,
    write=_write_phi3,
    fixed={"rotary_percent": ANY, "sliding_window": ANY, "rope_scaling": None},
    narrow=odd_heads,
    defaults={
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    },
    templates=("phi_3",),
    layer_names="phi3",
)  # fmt: skip


class PhiFamily(TextFamily):
    """Phi-1.5 and Phi-2 alone."""

    name = "phi"
    title = "Phi-1.5, Phi-2 language models"
    kind = PHI


class Phi3Family(TextFamily):
    """Phi-3 alone."""

    name = "phi3"
    title = "Phi-3 language models"
    kind = PHI3
