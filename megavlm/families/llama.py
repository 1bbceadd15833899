"""Llama and Vicuna, Qwen2 and Qwen2.5, Qwen3, Mistral: one table, as Transformers writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megavlm.architectures.decoders.decoder.tables import LLAMA_LANGUAGE
from megavlm.config.schema import LanguageConfig, ModelConfig
from megavlm.families.common import expect
from megavlm.families.decoders import llama_config, llama_language
from megavlm.families.family import Family, Tree, config_file
from megavlm.families.text_kinds import ANY, TextKind, chosen, refused, shape, shape_config
from megavlm.weights.rules import Table
from megavlm.weights.source import Source

# Transformers' LlamaConfig; the hub's LLaVA-1.5 leaves out what it has no other value for.
LLAMA_DEFAULTS: Tree = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}


def _read_mistral(config: Mapping[str, Any], where: str) -> Tree:
    expect(config, where, model_type="mistral", hidden_act="silu")
    # Transformers' MistralConfig has a window where config.json says nothing of one.
    return {**shape(config, where, "mistral"), "sliding_window": config.get("sliding_window", 4096)}


def _write_mistral(language: LanguageConfig) -> Tree:
    return {
        **shape_config(language, "mistral", "MistralForCausalLM"),
        "head_dim": language.kv_channels,
        "hidden_act": "silu",
        "sliding_window": language.sliding_window,
    }


LLAMA = TextKind(
    "llama", "Llama", LLAMA_LANGUAGE, llama_language, llama_config,
    {"rotary_sections": ANY}, defaults=LLAMA_DEFAULTS,
    templates=("llama_3", "phi_3", "vicuna_v1"),  # Llama 3 and a Phi-3 that is stored as one are known by their tokens
)  # fmt: skip
QWEN2 = TextKind(
    "qwen2", "Qwen2", LLAMA_LANGUAGE, llama_language, llama_config, {"add_qkv_bias": True, "rotary_sections": ANY},
    defaults={
        "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 151936, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    },
    templates=("qwen2",),
)  # fmt: skip
QWEN3 = TextKind(
    "qwen3", "Qwen3", LLAMA_LANGUAGE, llama_language, llama_config,
    {"qk_layernorm": True, "rotary_sections": ANY},
    defaults={
        "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
    },
    templates=("qwen2",),
)  # fmt: skip
MISTRAL = TextKind(
    "mistral", "Mistral", LLAMA_LANGUAGE, _read_mistral, _write_mistral, {"sliding_window": ANY},
    defaults={
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
    },
    templates=("mistral",),
)  # fmt: skip
KINDS = {kind.model_type: kind for kind in (LLAMA, QWEN2, QWEN3, MISTRAL)}


class LlamaFamily(Family):
    """The language model alone."""

    name = "llama"
    title = "Llama, Vicuna, Mistral, Qwen2, Qwen2.5, Qwen3 language models"
    parts = ("language",)
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {"language": ("decoder",)}

    def detect(self, source: Source) -> bool:
        """By ``model_type``."""
        return source.config.get("model_type") in KINDS

    def branches(self, source: Source) -> Tree:
        """Return the language branch."""
        return {"language": KINDS[source.config["model_type"]].branch(source.config, config_file(source))}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the table."""
        return [LLAMA_LANGUAGE]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return the configuration of the kind that the model's biases and norms say."""
        kind = chosen(list(KINDS.values()), model.language)
        assert kind is not None, "a model that is refused is not written"
        return kind.write(model.language)

    def refuses(self, model: ModelConfig) -> str | None:
        """A Qwen v1 model would load as Qwen2, so nothing but odd mixtures is refused."""
        return no_llama(model.language, (*_WITHOUT_WINDOW, MISTRAL))


_WITHOUT_WINDOW = (LLAMA, QWEN2, QWEN3)


def no_llama(language: LanguageConfig, kinds: Sequence[TextKind] = _WITHOUT_WINDOW) -> str | None:
    """Return why no model of this family is like ``language``, or None.

    Args:
        language: the branch.
        kinds: of the family, those that count.
    """
    if language.add_qkv_bias and language.qk_layernorm:
        return "the language model has both a bias on QKV and a norm on queries and keys; Qwen2 and Qwen3 have one each"
    return refused(kinds, language)
