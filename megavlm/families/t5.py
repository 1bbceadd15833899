"""Encoder-decoder language models as Transformers has them (``T5ForConditionalGeneration``): T5 1.1, UL2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megavlm.architectures.decoders.encoder_decoder.tables import T5_DECODER, T5_ENCODER
from megavlm.config.errors import UserError
from megavlm.config.schema import LanguageConfig, ModelConfig
from megavlm.families.common import expect, need, number
from megavlm.families.family import Family, Tree, config_file
from megavlm.weights.rules import Table
from megavlm.weights.source import Source

_GATES = {"gated-gelu": "gelu_tanh", "gated-silu": "silu"}
"""By ``feed_forward_proj``; the first T5s have no gate, and an output layer that is the embedding."""
# ``dropout_rate``, ``classifier_dropout`` and ``initializer_factor`` say how a model was trained and drawn, and nothing
# of what it computes: they may be anything, and stay in a file that has them. Runs here drop nothing out.


def t5_language(config: Mapping[str, Any], where: str) -> Tree:
    """Return the recipe's ``model.language`` of a T5's ``config.json``.

    Raises:
        UserError: a key is missing, or has a value that the model here does not know.
    """
    layers, gate = need(config, "num_layers", where), config.get("feed_forward_proj")
    expect(config, where, model_type="t5", quantization_config=None, num_decoder_layers=layers, is_encoder_decoder=True)
    if gate not in _GATES:
        raise UserError(
            f"{where}: feed_forward_proj is {gate!r}; only {' or '.join(_GATES)} is supported (T5 1.1, UL2)"
        )
    # Transformers 5 writes that they are tied whatever was read, and the truth under the other name.
    tied = config.get("scale_decoder_outputs", config.get("tie_word_embeddings"))
    if tied is not False:
        raise UserError(
            f"{where}: tie_word_embeddings is {tied!r}; only false is supported: output"
            " layers that are the embedding are the first T5s', which have no gate either"
        )
    return {
        "preset": "t5",
        "num_layers": layers,
        "hidden_size": need(config, "d_model", where),
        "ffn_hidden_size": need(config, "d_ff", where),
        "num_attention_heads": need(config, "num_heads", where),
        "kv_channels": need(config, "d_kv", where),
        "activation": _GATES[gate],
        "relative_buckets": config.get("relative_attention_num_buckets", 32),
        "relative_farthest": config.get("relative_attention_max_distance", 128),
        "vocab_size": need(config, "vocab_size", where),
        "norm_epsilon": number(config, "layer_norm_epsilon", where, 1e-6),
    }


def t5_config(language: LanguageConfig) -> Tree:
    """Return the ``config.json`` of a T5."""
    gate = next(name for name, activation in _GATES.items() if activation == language.activation)
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "d_ff": language.ffn_hidden_size,
        "d_kv": language.kv_channels,
        "d_model": language.hidden_size,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "feed_forward_proj": gate,
        "is_encoder_decoder": True,
        "layer_norm_epsilon": language.norm_epsilon,
        "model_type": "t5",
        "num_decoder_layers": language.num_layers,
        "num_heads": language.num_attention_heads,
        "num_layers": language.num_layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": language.relative_farthest,
        "relative_attention_num_buckets": language.relative_buckets,
        "tie_word_embeddings": False,
        "vocab_size": language.vocab_size,
    }


class T5Family(Family):
    """T5 1.1 or UL2 alone."""

    name = "t5"
    title = "T5 1.1 and UL2 language models"
    parts = ("language",)
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {"language": ("encoder_decoder",)}
    own_rotary = True
    two_way = "prefix"

    def detect(self, source: Source) -> bool:
        """By ``model_type``."""
        return source.config.get("model_type") == "t5"

    def branches(self, source: Source) -> Tree:
        """Return the language branch."""
        return {"language": t5_language(source.config, config_file(source))}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the tables of both stacks."""
        return [T5_ENCODER, T5_DECODER]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return the configuration."""
        return t5_config(model.language)
