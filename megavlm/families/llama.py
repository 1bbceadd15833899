"""Llama and Vicuna, Qwen2 and Qwen2.5, Qwen3: one table, as Transformers writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from megavlm.architectures.decoders.decoder.tables import LLAMA_LANGUAGE
from megavlm.config.schema import LanguageConfig, ModelConfig
from megavlm.families.decoders import llama_config, llama_language
from megavlm.families.family import Family, Tree, config_file
from megavlm.weights.rules import Table
from megavlm.weights.source import Source


class LlamaFamily(Family):
    """The language model alone."""

    name = "llama"
    title = "Llama, Vicuna, Qwen2, Qwen2.5, Qwen3 language models"
    parts = ("language",)
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {"language": ("decoder",)}

    def detect(self, source: Source) -> bool:
        """By ``model_type``."""
        return source.config.get("model_type") in ("llama", "qwen2", "qwen3")

    def branches(self, source: Source) -> Tree:
        """Return the language branch."""
        return {"language": llama_language(source.config, config_file(source))}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the table."""
        return [LLAMA_LANGUAGE]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return the configuration of the kind that the model's biases and norms say."""
        return llama_config(model.language)

    def refuses(self, model: ModelConfig) -> str | None:
        """A Qwen v1 model would load as Qwen2, so nothing but odd mixtures is refused."""
        return no_llama(model.language)


def no_llama(language: LanguageConfig) -> str | None:
    """Return why no model of this family is like ``language``, or None."""
    if language.add_qkv_bias and language.qk_layernorm:
        return "the language model has both a bias on QKV and a norm on queries and keys; Qwen2 and Qwen3 have one each"
    return None
