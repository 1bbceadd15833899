"""What planner and MFU ask of the language model: the decoder's own answers, and what the gains add."""

from __future__ import annotations

from typing import Any

from megavlm.architectures.cost import Kernels, Shards, Work
from megavlm.architectures.decoders.decoder import cost
from megavlm.architectures.decoders.decoder.cost import (
    adapter_parameters,
    adapter_widths,
    adapters_kept,
    attention_kept,
    layer_passage,
    layer_passing,
    shared_kept,
    vocabulary,
)
from quilt.config import ScaledDecoderConfig

__all__ = [
    "adapter_parameters", "adapter_widths", "adapters_kept", "attention_kept", "layer_kept", "layer_parameters",
    "layer_passage", "layer_passing", "layer_work", "linear_parameters", "shared_kept", "vocabulary",
]  # fmt: skip


def layer_parameters(language: ScaledDecoderConfig, tensor: int) -> list[int]:
    """Return the decoder's, and the gain."""
    return [*cost.layer_parameters(language, tensor), language.hidden_size]


def linear_parameters(language: ScaledDecoderConfig, tensor: int) -> list[int]:
    """Return the decoder's."""
    return cost.linear_parameters(language, tensor)


def layer_work(language: ScaledDecoderConfig, tokens: float, squared_lengths: float) -> Work:
    """Return the decoder's, and a multiplication by the gain."""
    own = cost.layer_work(language, tokens, squared_lengths)
    return Work(own.products, own.attention, own.whole + tokens * language.hidden_size)


def layer_kept(language: ScaledDecoderConfig, shards: Shards, tokens: int, kernels: Kernels, **learns: Any) -> int:
    """Return the decoder's, and what the gain multiplies."""
    local = tokens // shards.tensor if shards.sequence_parallel else tokens
    kept = cost.layer_kept(language, shards, tokens, kernels, **learns)
    return kept + local * language.hidden_size * kernels.number_bytes
