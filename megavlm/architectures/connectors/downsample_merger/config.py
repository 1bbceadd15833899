"""Keys of GLM-4.1V's connector, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from megavlm.architectures.blocks import BlockConnectorConfig, block_rules
from megavlm.config.fields import Meaning, config_class
from megavlm.config.rules import TP, divides
from megavlm.config.schema import ModelConfig, ParallelConfig

_OWN = "model.connector"


@config_class
class DownsampleMergerConfig(BlockConnectorConfig):
    """Blocks of patches become one token each: a strided convolution, linear, LayerNorm, GELU, and a SwiGLU MLP."""

    ffn_hidden_size: int = Field(default=13696, gt=0, le=10_000_000)
    """Width of the gated MLP (Hugging Face: vision_config.intermediate_size)."""
    layernorm_epsilon: float = Field(default=1e-5, gt=0)
    """Epsilon of the norm."""
    init_method_std: Annotated[float, Meaning.RUN] = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""


def rules(model: ModelConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    yield from block_rules(model)
    tp = layout.tensor_model_parallel_size
    yield from divides("model.language.hidden_size", model.language.hidden_size, tp, TP)
    yield from divides(f"{_OWN}.ffn_hidden_size", model.connector.ffn_hidden_size, tp, TP)
