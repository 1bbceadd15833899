"""Mamba language models of the first kind (``MambaForCausalLM``): no attention, no MLP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megavlm.architectures.decoders.mamba.tables import MAMBA_LANGUAGE
from megavlm.config.schema import LanguageConfig, ModelConfig
from megavlm.families.common import expect, flag, need, number
from megavlm.families.family import Family, Tree, config_file
from megavlm.weights.rules import Table
from megavlm.weights.source import Source

_FIXED: dict[str, Any] = {
    "hidden_act": "silu", "use_bias": False, "use_conv_bias": True, "residual_in_fp32": True,
}  # fmt: skip
"""What the models here have one value for. ``residual_in_fp32`` says what a run in bf16 rounds: the stream here is of
the run's number type, as Megatron-Core's is (docs/conversion.md). ``time_step_*`` (but the rank) and
``rescale_prenorm_residual`` say how new weights are drawn: they may be anything, and stay in a file that has them."""


def mamba_language(config: Mapping[str, Any], where: str) -> Tree:
    """Return the recipe's ``model.language`` of a Mamba's ``config.json``.

    Raises:
        UserError: a key is missing, or has a value that the model here does not know.
    """
    expect(config, where, model_type="mamba", quantization_config=None, **_FIXED)
    hidden = need(config, "hidden_size", where)
    inner = config.get("intermediate_size") or int(number(config, "expand", where, 2) * hidden)
    rank = config.get("time_step_rank", "auto")
    return {
        "preset": "mamba",
        "num_layers": config.get("num_hidden_layers") or need(config, "n_layer", where),
        "hidden_size": hidden,
        "intermediate_size": inner,
        "state_size": need(config, "state_size", where),
        "conv_kernel": config.get("conv_kernel", 4),
        "time_step_rank": -(-hidden // 16) if rank == "auto" else rank,
        "vocab_size": need(config, "vocab_size", where),
        "norm_epsilon": number(config, "layer_norm_epsilon", where, 1e-5),
        "tie_word_embeddings": flag(config, "tie_word_embeddings", where, default=True),
        "init_method_std": number(config, "initializer_range", where, 0.1),
    }


def mamba_config(language: LanguageConfig) -> Tree:
    """Return the ``config.json`` of a Mamba that :func:`mamba_refused` does not refuse."""
    return {
        "architectures": ["MambaForCausalLM"],
        "conv_kernel": language.conv_kernel,
        "expand": language.intermediate_size // language.hidden_size,
        "hidden_size": language.hidden_size,
        "initializer_range": language.init_method_std,
        "intermediate_size": language.intermediate_size,
        "layer_norm_epsilon": language.norm_epsilon,
        "model_type": "mamba",
        "num_hidden_layers": language.num_layers,
        "state_size": language.state_size,
        "tie_word_embeddings": language.tie_word_embeddings,
        "time_step_rank": language.time_step_rank,
        "vocab_size": language.vocab_size,
        **_FIXED,
    }


def mamba_refused(language: LanguageConfig) -> str | None:
    """Return why Transformers' class cannot hold a model, or None: its channels are a multiple of its width."""
    inner, hidden = language.intermediate_size, language.hidden_size
    if inner % hidden:
        return f"the language model's intermediate_size ({inner}) is no multiple of hidden_size ({hidden})"
    return None


class MambaFamily(Family):
    """Mamba alone, as Transformers has it."""

    name = "mamba"
    title = "Mamba language models"
    parts = ("language",)
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {"language": ("mamba",)}
    own_rotary = True

    def detect(self, source: Source) -> bool:
        """By ``model_type``."""
        return source.config.get("model_type") == "mamba"

    def branches(self, source: Source) -> Tree:
        """Return the language branch."""
        return {"language": mamba_language(source.config, config_file(source))}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the table."""
        return [MAMBA_LANGUAGE]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return the configuration."""
        return mamba_config(model.language)

    def refuses(self, model: ModelConfig) -> str | None:
        """As Transformers' class."""
        return mamba_refused(model.language)
