"""Keys of CogVLM's connector, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from megavlm.config.fields import Meaning, config_class
from megavlm.config.rules import TP, divides
from megavlm.config.schema import ConnectorConfig, ModelConfig, ParallelConfig

_OWN = "model.connector"

ENDS = 2
"""Tokens of a picture beside those of its patches: one that begins it, one that ends it."""


@config_class
class GLUConfig(ConnectorConfig):
    """Linear, LayerNorm, GELU and a SwiGLU MLP on each patch, without biases; a learned vector before and behind."""

    ffn_hidden_size: int = Field(default=11008, gt=0, le=10_000_000)
    """Width of the gated MLP (CogVLM: the language model's intermediate_size)."""
    layernorm_epsilon: float = Field(default=1e-5, gt=0)
    """Epsilon of the norm."""
    init_method_std: Annotated[float, Meaning.RUN] = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights; the two vectors start at 0."""

    @property
    def each_patch(self) -> bool:
        """It does."""
        return True

    @property
    def spatial(self) -> bool:
        """Not with the two that are no patches."""
        return False

    def tokens_of(self, grid: tuple[int, int]) -> int:
        """Return one for each patch, and two."""
        return grid[0] * grid[1] + ENDS


def own(model: ModelConfig) -> GLUConfig:
    """Return the connector's branch."""
    assert isinstance(model.connector, GLUConfig)
    return model.connector


def rules(model: ModelConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    tp = layout.tensor_model_parallel_size
    yield from divides("model.language.hidden_size", model.language.hidden_size, tp, TP)
    yield from divides(f"{_OWN}.ffn_hidden_size", own(model).ffn_hidden_size, tp, TP)
