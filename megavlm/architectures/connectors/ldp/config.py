"""Keys of MobileVLM's connectors, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from megavlm.config.fields import Meaning, config_class
from megavlm.config.rules import TP, divides
from megavlm.config.schema import ConnectorConfig, ModelConfig, ParallelConfig

_OWN = "model.connector"


@config_class
class LDPConfig(ConnectorConfig):
    """Linear, GELU, linear on every patch, then what makes the map of patches smaller."""

    version: int = Field(default=1, ge=1, le=2)
    """1 (LDP): two blocks of MobileNet v3, of which the second halves rows and columns. 2 (LDPv2): means over an even
    grid, and a depthwise convolution that is added."""
    output_grid: int | None = Field(default=None, gt=0, le=1000)
    """With version 2: rows and columns of tokens; null with version 1."""
    init_method_std: Annotated[float, Meaning.RUN] = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights of linear layers and 1 x 1 convolutions."""

    def tokens_of(self, grid: tuple[int, int]) -> int:
        """Return the tokens of the smaller map; the patches where version 2 has no grid (which a rule refuses)."""
        if self.version == 1:
            return ((grid[0] + 1) // 2) * ((grid[1] + 1) // 2)
        return grid[0] * grid[1] if self.output_grid is None else self.output_grid**2


def own(model: ModelConfig) -> LDPConfig:
    """Return the connector's branch."""
    assert isinstance(model.connector, LDPConfig)
    return model.connector


def squeezed(width: int) -> int:
    """Return the width inside a gate of so many channels: a quarter, rounded as MobileNet does to a multiple of 8."""
    quarter = width // 4
    found = max(8, (quarter + 4) // 8 * 8)
    return found + 8 if found < 0.9 * quarter else found


def rules(model: ModelConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    connector, hidden, tp = own(model), model.language.hidden_size, layout.tensor_model_parallel_size
    rows, columns = model.vision.grid
    yield from divides("model.language.hidden_size", hidden, tp, TP)
    if connector.version == 1:
        yield from divides("model.language.hidden_size", hidden, 8, "8, as MobileNet's blocks ask")
        yield from divides(f"model.language.hidden_size {hidden}, a quarter of it", squeezed(hidden), tp, TP)
        if connector.output_grid is not None:
            yield f"{_OWN}.output_grid: version 1 halves rows and columns whatever they are; set it to null"
    elif connector.output_grid is None:
        yield f"{_OWN}.output_grid: version 2 needs it; set it to a number, as 12"
    elif connector.output_grid > min(rows, columns):
        yield (
            f"{_OWN}.output_grid: {connector.output_grid} is more than the {rows} x {columns} patches that the tower"
            " makes; lower it"
        )
