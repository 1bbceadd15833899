"""Keys of a connector that joins two towers by halves, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megavlm.config.fields import Meaning, config_class
from megavlm.config.rules import TP, divides
from megavlm.config.schema import ConnectorConfig, ModelConfig, ParallelConfig

_OWN = "model.connector"


@config_class
class HybridSplitConfig(ConnectorConfig):
    """A linear layer for the features of each of two towers, half of the width each; GELU, and a linear layer."""

    first: Literal["low", "high"] = "high"
    """Which tower's half stands first: low (the first tower's, Vary) or high (the second's, DeepSeek-VL-7B)."""
    output_layer: bool = True
    """Whether GELU and a linear layer stand behind the halves (DeepSeek-VL-7B); else these are the tokens (Vary)."""
    init_method_std: Annotated[float, Meaning.RUN] = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""


def rules(model: ModelConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    if len(model.vision.towers) != 2:
        yield (
            f"{_OWN}.preset: {model.connector.preset} joins the features of two towers, and {model.vision.preset!r} is"
            " one; take another connector, or a pair of towers (deepseek_vl_hybrid, vary_clip_sam)"
        )
    ranks = 2 * layout.tensor_model_parallel_size
    yield from divides("model.language.hidden_size", model.language.hidden_size, ranks, f"twice {TP}")


def products(model: ModelConfig, tp: int) -> tuple[tuple[str, int, int], ...]:
    """Return the sizes of the connector's matrix products: key, number, ranks that share it."""
    low, high = model.vision.feature_sizes
    return (
        ("model.vision.hidden_size", low, 1),
        ("model.vision.high_neck_size x 4", high, 1),
        ("model.language.hidden_size", model.language.hidden_size // 2, tp),
        ("model.vision.image_size", model.tokens_per_view, 1),
    )
