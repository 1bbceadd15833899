"""Keys of latent attention (MLA; DeepSeek-V2, arXiv 2405.04434), by the names of its config.json, and their rules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from megavlm.architectures.decoders.decoder.experts import ExpertsConfig
from megavlm.config.fields import config_class
from megavlm.config.schema import ParallelConfig

_OWN = "model.language"
_PLAIN: dict[str, Any] = {
    "qk_layernorm": False, "head_layernorm": False, "visual_expert": False, "cross_attention_layers": (),
    "attention_mask": "causal", "sliding_window": None, "rotary_sections": (), "rope_local_base_freq": None,
    "use_dynamic_ntk": False, "use_logn_attn": False, "add_qkv_bias": False, "add_bias_linear": False,
    "use_parallel_residual": False, "pre_layernorms": True, "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
}  # fmt: skip
"""What layers with latent attention have, as DeepSeek's."""


@config_class
class LatentConfig(ExpertsConfig):
    """How keys and values are made of a latent, where they are."""

    kv_lora_rank: int | None = Field(default=None, gt=0, le=1_000_000)
    """Width of the latent that a token's keys and values are made of (MLA, DeepSeek-V2); null where they are made of
    the stream. A head's queries and keys are kv_channels wide (Hugging Face: qk_nope_head_dim + qk_rope_head_dim), of
    which rotary_percent have a position, which is one key for all heads."""
    q_lora_rank: int | None = Field(default=None, gt=0, le=1_000_000)
    """With kv_lora_rank: width of the latent that queries are made of; null where they are made of the stream."""
    v_head_dim: int | None = Field(default=None, gt=0, le=1_000_000)
    """With kv_lora_rank: width of a head's values, at most kv_channels."""

    @property
    def latent_attention(self) -> bool:
        """With ``kv_lora_rank``."""
        return self.kv_lora_rank is not None


def latent_rules(language: Any, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule about latent attention: key, rule, remedy.

    Args:
        language: a :class:`LatentConfig` with the keys of a decoder.
        layout: the recipe's.
    """
    key = f"{_OWN}.kv_lora_rank"
    if language.kv_lora_rank is None:
        for name in ("q_lora_rank", "v_head_dim"):
            if getattr(language, name) is not None:
                yield f"{_OWN}.{name}: has no effect without {key}; set that, or this to null"
        return
    width, values = language.kv_channels, language.v_head_dim
    if values is None:
        yield f"{key}: needs {_OWN}.v_head_dim, the width of a head's values; set it"
    elif values > width:
        yield f"{_OWN}.v_head_dim: {values} is more than {_OWN}.kv_channels ({width}), to which values are filled up"
    if not 0 < language.rotary_channels < width:
        yield (
            f"{_OWN}.rotary_percent: {language.rotary_percent:g} of {width} channels are {language.rotary_channels};"
            f" with {key} some have a position, and some have none: choose a part between"
        )
    heads = language.num_attention_heads
    if language.num_query_groups != heads:
        yield (
            f"{_OWN}.num_query_groups: {language.num_query_groups}, but with {key} each of the {heads} heads"
            f" (num_attention_heads) has keys of its own; set it to {heads}"
        )
    for name, value in _PLAIN.items():
        if getattr(language, name) != value:
            shown = str(value).lower() if isinstance(value, bool) else "null" if value is None else value or "[]"
            yield f"{key}: goes with {_OWN}.{name} {shown}; set that, or this to null"
