"""Keys of MiniGemini's connector, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from megavlm.config.fields import Meaning, config_class
from megavlm.config.rules import TP, divides
from megavlm.config.schema import ConnectorConfig, ModelConfig, ParallelConfig

_OWN = "model.connector"


@config_class
class PatchMiningConfig(ConnectorConfig):
    """Patch-info mining: each patch of the first tower attends to the second's features of its place; then an MLP."""

    depth: int = Field(default=2, gt=0, le=99)
    """Linear layers of the MLP, with GELU between them."""
    layernorm_epsilon: float = Field(default=1e-5, gt=0)
    """Epsilon of the norms in front of queries, keys and values."""
    init_method_std: Annotated[float, Meaning.RUN] = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""
    output_multiplier: Annotated[float, Meaning.USE] = Field(default=1.0, gt=0)
    """What the tokens are multiplied by, where a language model's embeddings are too (MiniGemini on Gemma); see
    model.language.embedding_multiplier."""


def places(model: ModelConfig) -> int:
    """Return how many features of the second tower lie in the place of one of the first's."""
    return int(model.vision.ratio**2)


def widths(model: ModelConfig) -> list[int]:
    """Return the width of a feature in front of the MLP, and of what each layer gives."""
    return [model.vision.feature_sizes[0]] + [model.language.hidden_size] * int(model.connector.depth)


def rules(model: ModelConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    tp = layout.tensor_model_parallel_size
    if len(model.vision.towers) != 2:
        yield (
            f"{_OWN}.preset: {model.connector.preset} mines the features of a second tower, and"
            f" {model.vision.preset!r} is one; take another connector, or a pair of towers (minigemini_clip_convnext)"
        )
        return
    yield from divides("model.vision.hidden_size", model.vision.feature_sizes[0], tp, TP)
    yield from divides("model.language.hidden_size", model.language.hidden_size, tp, TP)


def products(model: ModelConfig, tp: int) -> tuple[tuple[str, int, int], ...]:
    """Return the sizes of the connector's matrix products: key, number, ranks that share it."""
    low, high = model.vision.feature_sizes
    return (
        ("model.vision.hidden_size", low, tp),
        ("model.vision.high_widths", high // places(model), 1),
        ("model.language.hidden_size", model.language.hidden_size, tp),
        ("model.vision.image_size", model.tokens_per_view, 1),
    )
