"""Keys of connectors that make one token of several patches, and the rules between them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megavlm.config.fields import Meaning, config_class
from megavlm.config.rules import TP, divides
from megavlm.config.schema import ConnectorConfig, ModelConfig, ParallelConfig

_OWN = "model.connector"


@config_class
class PatchReducerConfig(ConnectorConfig):
    """Several patches become one token: side by side or their mean, a norm if there is one, linear layers."""

    merge: Literal["row", "square", "mean"] = "square"
    """How patches become a token: row (so many one behind the other, side by side), square (those of a square, side by
    side, row by row), or mean (of a square)."""
    patches: int = Field(default=4, gt=0, le=4096)
    """Patches that become one token; a square number, but with merge row."""
    depth: int = Field(default=1, gt=0, le=99)
    """Linear layers, with GELU between them."""
    add_bias_linear: bool = True
    """Whether these have a bias."""
    normalization: Literal["LayerNorm", "RMSNorm"] | None = None
    """Norm in front of the linear layers, of the whole token; null for none."""
    layernorm_zero_centered_gamma: bool = False
    """With normalization: it multiplies by 1 + weight (Gemma)."""
    layernorm_epsilon: float = Field(default=1e-6, gt=0)
    """With normalization: its epsilon."""
    init_method_std: Annotated[float, Meaning.RUN] = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""

    @property
    def side(self) -> int:
        """Side of a square of patches."""
        return math.isqrt(self.patches)

    def tokens_of(self, grid: tuple[int, int]) -> int:
        """Return the number of whole tokens."""
        if self.merge == "row":
            return grid[0] * grid[1] // self.patches
        return (grid[0] // self.side) * (grid[1] // self.side)


def own(model: ModelConfig) -> PatchReducerConfig:
    """Return the connector's branch."""
    assert isinstance(model.connector, PatchReducerConfig)
    return model.connector


def widths(model: ModelConfig) -> list[int]:
    """Return the width of a token in front of the linear layers, and of what each gives."""
    connector, width = own(model), model.vision.feature_size
    first = width if connector.merge == "mean" else width * connector.patches
    return [first] + [model.language.hidden_size] * connector.depth


def rules(model: ModelConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    connector, (rows, columns) = own(model), model.vision.grid
    count, made = connector.patches, "patches that the tower makes (model.vision.image_size / model.vision.patch_size)"
    if connector.merge == "row":
        if rows * columns % count:
            yield f"{_OWN}.patches: {count} does not divide the {rows * columns} {made}; change one of them"
    elif connector.side**2 != count:
        lower = connector.side
        yield (
            f"{_OWN}.patches: {count} is not a square number, which {_OWN}.merge {connector.merge} needs; take"
            f" {lower**2} or {(lower + 1) ** 2}"
        )
    elif rows % connector.side or columns % connector.side:
        yield (
            f"{_OWN}.patches: squares of {connector.side} x {connector.side} do not fill the {rows} x {columns} {made};"
            " change one of them"
        )
    if connector.normalization is None and connector.layernorm_zero_centered_gamma:
        yield f"{_OWN}.layernorm_zero_centered_gamma: goes with {_OWN}.normalization; set that, or this to false"
    tp = layout.tensor_model_parallel_size
    yield from divides("model.language.hidden_size", model.language.hidden_size, tp, TP)


def products(model: ModelConfig, tp: int) -> tuple[tuple[str, int, int], ...]:
    """Return the sizes of the connector's matrix products: key, number, ranks that share it."""
    return (
        ("model.vision.hidden_size", widths(model)[0], 1),
        ("model.language.hidden_size", model.language.hidden_size, tp),
        ("model.vision.image_size", model.tokens_per_view, 1),
    )
