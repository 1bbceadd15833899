"""All kinds of language models, and how a family has one of them as its language half (``text_config``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megavlm.config.errors import UserError
from megavlm.config.schema import LanguageConfig
from megavlm.families.deepseek_v2 import DEEPSEEK_V2
from megavlm.families.experts import MIXTRAL, QWEN3_MOE
from megavlm.families.family import Tree
from megavlm.families.gemma import GEMMA
from megavlm.families.gemma3 import GEMMA3
from megavlm.families.glm4 import GLM4
from megavlm.families.glm4_moe import GLM4_MOE
from megavlm.families.internlm2 import INTERNLM2
from megavlm.families.llama import KINDS
from megavlm.families.minicpm import MINICPM
from megavlm.families.phi import PHI, PHI3
from megavlm.families.stablelm import STABLELM
from megavlm.families.text_kinds import TextKind, chosen, refused
from megavlm.weights.rules import Table
from megavlm.weights.source import Source

_OTHERS = (PHI, PHI3, GEMMA, GEMMA3, GLM4, STABLELM, MINICPM, INTERNLM2, QWEN3_MOE, MIXTRAL, GLM4_MOE, DEEPSEEK_V2)
TEXT_KINDS: dict[str, TextKind] = {
    **KINDS,
    **{kind.model_type: kind for kind in _OTHERS},
}
"""By ``model_type``."""
_HALVES = tuple(kind for kind in TEXT_KINDS.values() if kind.in_transformers)


def text_kind(text: Any) -> TextKind | None:
    """Return the kind of a ``text_config``; None for one that is not known."""
    name = text.get("model_type", "llama") if isinstance(text, Mapping) else None
    return next((kind for kind in _HALVES if kind.model_type == name), None)


def text_branch(source: Source, text: Mapping[str, Any], head: str, where: str) -> Tree:
    """Return ``model.language`` of a ``text_config``.

    Args:
        source: the whole checkpoint.
        text: the configuration.
        head: what the names of its output layer begin with.
        where: its file, for messages.

    Raises:
        UserError: it is of no known kind, or has a value that is not known.
    """
    kind = text_kind(text)
    if kind is None:
        known = ", ".join(one.model_type for one in _HALVES)
        raise UserError(f"{where}: model_type of text_config is {text.get('model_type')!r}; there are {known}")
    return language_branch(kind, source, {**kind.defaults, **text}, head, where)


def language_branch(kind: TextKind, source: Source, config: Mapping[str, Any], head: str, where: str) -> Tree:
    """Return ``model.language`` of a language half.

    Args:
        kind: of language model.
        source: the whole checkpoint.
        config: the half's configuration.
        head: what the names of its output layer begin with.
        where: its file, for messages.

    Raises:
        UserError: it has a value that is not known.
    """
    language = kind.branch(config, where)
    # A head that is written out is one of its own, where the whole model's configuration does not tie it.
    apart = head + "weight" in source and source.config.get("tie_word_embeddings") is False
    language["tie_word_embeddings"] = language["tie_word_embeddings"] and not apart
    if "lm_head_bias" in kind.fixed:  # not all composed models have one
        language["lm_head_bias"] = head + "bias" in source
    return language


def text_table(language: LanguageConfig, *, model: str, head: str) -> Table:
    """Return the table of a language half, with what its names begin with."""
    kind = _half(language)
    return dataclasses.replace((kind or TEXT_KINDS["llama"]).table, names={"model": model, "head": head})


def text_config(language: LanguageConfig) -> Tree:
    """Return the ``text_config`` of a language half that is not refused."""
    kind = _half(language)
    assert kind is not None, "a model that is refused is not written"
    return kind.write(language)


def no_half(language: LanguageConfig, *, head_bias: bool = False) -> str | None:
    """Return why a language model is no half of a composed model of Transformers, or None.

    Args:
        language: the branch.
        head_bias: whether the output layer's bias, which Phi has alone, has a place in the family.
    """
    if getattr(language, "lm_head_bias", False) and not head_bias:
        return "the language model's output layer has a bias, for which Transformers' composed models have no place"
    if getattr(language, "rotary_sections", ()):
        return "the language model has three numbers a position (model.language.rotary_sections), LLaVA's have one"
    if language.add_qkv_bias and language.qk_layernorm and not getattr(language, "add_bias_linear", False):
        return "the language model has both a bias on QKV and a norm on queries and keys; Qwen2 and Qwen3 have one each"
    return refused(_HALVES, with_head(language))


def _half(language: LanguageConfig) -> TextKind | None:
    return chosen(_HALVES, with_head(language))


def with_head(language: LanguageConfig) -> LanguageConfig:
    """Return a half as it would stand alone: Phi's output layer has a bias there."""
    if not getattr(language, "add_bias_linear", False):
        return language
    return dataclasses.replace(language, lm_head_bias=True)  # type: ignore[call-arg]
