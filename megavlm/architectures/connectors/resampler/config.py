"""Keys of Qwen-VL's resampler, and the rules between them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from megavlm.config.fields import Meaning, config_class
from megavlm.config.rules import TP, divides
from megavlm.config.schema import ConnectorConfig, ModelConfig, ParallelConfig

_OWN = "model.connector"


@config_class
class ResamplerConfig(ConnectorConfig):
    """Learned queries that look at the patches, whatever their number."""

    num_queries: int | None = Field(default=None, gt=0, le=1_000_000)
    """Queries of the resampler, a square number: the tokens that one image becomes.
    Null for linear and mlpNx_gelu, which keep one token per patch."""
    head_dim: int | None = Field(default=None, gt=0, le=1_000_000)
    """Width of one attention head of the resampler; divides the language model's hidden_size. Null for the others."""
    init_method_std: Annotated[float, Meaning.RUN] = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""

    def tokens_of(self, grid: tuple[int, int]) -> int:
        """Return the queries, or the patches where they are not set (which a rule refuses)."""
        return self.num_queries or super().tokens_of(grid)


def head_rules(model: ModelConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield what is wrong with the width of a head."""
    connector, hidden = model.connector, model.language.hidden_size
    if connector.head_dim is not None:
        if hidden % connector.head_dim:
            yield (
                f"{_OWN}.head_dim: {connector.head_dim} is no divisor of model.language.hidden_size ({hidden});"
                " take a divisor"
            )
        else:
            heads, tp = hidden // connector.head_dim, layout.tensor_model_parallel_size
            if heads % tp:
                yield f"{_OWN}.head_dim: gives {heads} heads, not divisible by {TP} ({tp}); change one of the two"


def rules(model: ModelConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    connector, hidden = model.connector, model.language.hidden_size
    assert isinstance(connector, ResamplerConfig)
    for name in ("num_queries", "head_dim"):
        if getattr(connector, name) is None:
            yield f"{_OWN}.{name}: the resampler needs it; set it to a number"
    rows, columns = model.vision.grid
    if rows != columns:
        yield (
            f"{_OWN}.preset: the resampler's positions are those of a square, and the tower makes {rows} x {columns}"
            " features; take another connector"
        )
    # The 2D sin-cos table: halves for column and row, each with as many sines as cosines.
    yield from divides("model.language.hidden_size", hidden, 4, "4, as the resampler's sin-cos positions ask")
    if connector.num_queries is not None and math.isqrt(connector.num_queries) ** 2 != connector.num_queries:
        side = math.isqrt(connector.num_queries)
        yield (
            f"{_OWN}.num_queries: {connector.num_queries} is not a square number, which a grid of queries needs;"
            f" take {side**2 or 1} or {(side + 1) ** 2}"
        )
    yield from head_rules(model, layout)


def products(model: ModelConfig, tp: int) -> tuple[tuple[str, int, int], ...]:
    """Return the sizes of the connector's matrix products: key, number, ranks that share it."""
    connector = model.connector
    assert isinstance(connector, ResamplerConfig)
    return (
        ("model.vision.hidden_size", model.vision.feature_size, 1),
        ("model.language.hidden_size", model.language.hidden_size, tp),
        ("model.vision.image_size", model.vision.patches_per_image, 1),
        (f"{_OWN}.num_queries", connector.num_queries or 0, 1),
    )
