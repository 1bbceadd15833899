"""MiniCPM-2B: a Llama whose embeddings, branches and logits are multiplied (arXiv 2404.06395, section 4.1).

The keys are those of openbmb/MiniCPM-2B-sft-bf16's ``configuration_minicpm.py``; Transformers has no class for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megavlm.architectures.decoders.decoder.tables import LLAMA_LANGUAGE
from megavlm.config.schema import LanguageConfig
from megavlm.families.common import expect, flag, need, number
from megavlm.families.family import Tree
from megavlm.families.text_kinds import ANY, TextFamily, TextKind, own_code, own_scaling, shape, shape_config


def _read(config: Mapping[str, Any], where: str) -> Tree:
    expect(config, where, model_type="minicpm", hidden_act="silu", attention_bias=False, pretraining_tp=1,
           use_mup=True, sparse_config=None)  # fmt: skip
    own = shape(config, where, "minicpm")
    width = number(config, "dim_model_base", where, 1)
    return {
        **own,
        "tie_word_embeddings": flag(config, "tie_word_embeddings", where, default=True),
        "embedding_multiplier": float(number(config, "scale_emb", where, 1)),
        "residual_multiplier": number(config, "scale_depth", where, 1) / math.sqrt(need(own, "num_layers", where)),
        "logits_scaling": own["hidden_size"] / width,
    }


def _write(language: LanguageConfig) -> Tree:
    depth = language.residual_multiplier * math.sqrt(language.num_layers)
    return {
        **shape_config(language, "minicpm", "MiniCPMForCausalLM"),
        "attention_bias": False,
        "auto_map": {
            "AutoConfig": "configuration_minicpm.MiniCPMConfig",
            "AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM",
        },
        "dim_model_base": _whole(language.hidden_size / language.logits_scaling),
        "hidden_act": "silu",
        "rope_scaling": own_scaling(language),
        "scale_depth": _depth(depth, language),
        "scale_emb": _whole(language.embedding_multiplier),
    }


def _whole(value: float) -> float | int:
    """Return a number as its authors write it: without a point where it is whole."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value


def _depth(value: float, language: LanguageConfig) -> float:
    """Return the shortest number that gives the multiplier back, bit for bit."""
    root = math.sqrt(language.num_layers)
    for digits in range(1, 17):
        short = float(f"{value:.{digits}g}")
        if short / root == language.residual_multiplier:
            return short
    return value


MINICPM = TextKind(
    model_type="minicpm",
    title="MiniCPM",
    table=LLAMA_LANGUAGE,
    read=_read,
    write=_write,
    fixed={"embedding_multiplier": ANY, "residual_multiplier": ANY, "logits_scaling": ANY},
    narrow=own_code,
    templates=("minicpm",),
    in_transformers=False,
)


class MiniCPMFamily(TextFamily):
    """MiniCPM-2B alone."""

    name = "minicpm"
    title = "MiniCPM (2B) language models"
    kind = MINICPM
