"""Keys of InternVL's connector, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from megavlm.config.fields import Meaning, config_class
from megavlm.config.rules import TP, divides
from megavlm.config.schema import ConnectorConfig, ModelConfig, ParallelConfig

_OWN = "model.connector"


@config_class
class PixelShuffleConfig(ConnectorConfig):
    """Squares of patches become one token each: their features side by side, LayerNorm, linear, GELU, linear."""

    factor: int = Field(default=2, gt=0, le=64)
    """Side of a square of patches that becomes one token (InternVL's downsample_ratio is 1 / factor); divides the rows
    and columns of the tower's patches."""
    init_method_std: Annotated[float, Meaning.RUN] = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""

    def tokens_of(self, grid: tuple[int, int]) -> int:
        """Return the number of whole squares."""
        return (grid[0] // self.factor) * (grid[1] // self.factor)


def width_of(model: ModelConfig) -> int:
    """Return the width of a token in front of the linear layers."""
    return model.vision.feature_size * int(model.connector.factor) ** 2


def rules(model: ModelConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    factor = model.connector.factor
    for what, side in zip(("rows", "columns"), model.vision.grid, strict=True):
        if side % factor:
            yield (
                f"{_OWN}.factor: {factor} does not divide the {side} {what} of patches that the tower makes"
                " (model.vision.image_size / model.vision.patch_size); change one of them"
            )
            break
    hidden, tp = model.language.hidden_size, layout.tensor_model_parallel_size
    yield from divides("model.language.hidden_size", hidden, tp, TP)


def products(model: ModelConfig, tp: int) -> tuple[tuple[str, int, int], ...]:
    """Return the sizes of the connector's matrix products: key, number, ranks that share it."""
    return (
        ("model.vision.hidden_size", width_of(model), 1),
        ("model.language.hidden_size", model.language.hidden_size, tp),
        ("model.vision.image_size", model.tokens_per_view, 1),
    )
