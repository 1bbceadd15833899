"""Keys of the C-Abstractor, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from megavlm.config.fields import Meaning, config_class
from megavlm.config.rules import TP, divides
from megavlm.config.schema import ConnectorConfig, ModelConfig, ParallelConfig

_OWN = "model.connector"


@config_class
class CAbstractorConfig(ConnectorConfig):
    """RegNet blocks, means over an even grid, as many blocks again, and linear layers with SiLU between them."""

    output_grid: int = Field(default=12, gt=0, le=1000)
    """Rows and columns of tokens (the root of Honeybee's num_query_tokens)."""
    hidden_size: int = Field(default=1024, gt=0, le=10_000_000)
    """Channels of the blocks."""
    num_blocks: int = Field(default=3, ge=0, le=1000)
    """Blocks in front of the pooling, and behind it (Honeybee's depth); 0 for pooling and linear layers alone."""
    mlp_depth: int = Field(default=2, gt=0, le=99)
    """Linear layers."""
    position_embedding: bool = True
    """Add a learned vector to each patch first (Honeybee's pos_emb)."""
    init_method_std: Annotated[float, Meaning.RUN] = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights of positions, linear layers and 1 x 1 convolutions."""

    def tokens_of(self, grid: tuple[int, int]) -> int:
        """Return the tokens of the smaller map, whatever the grid."""
        return self.output_grid**2


def own(model: ModelConfig) -> CAbstractorConfig:
    """Return the connector's branch."""
    assert isinstance(model.connector, CAbstractorConfig)
    return model.connector


def blocks(model: ModelConfig) -> list[tuple[int, int, bool]]:
    """Return the channels into each block, those inside its gate, and whether it lies in front of the pooling."""
    connector, found = own(model), []
    for ahead in (True, False):
        for number in range(connector.num_blocks):
            size_in = model.vision.feature_size if ahead and number == 0 else connector.hidden_size
            found.append((size_in, round(size_in * 0.25), ahead))
    return found


def widths(model: ModelConfig) -> list[int]:
    """Return the channels in front of the linear layers, and what each gives."""
    connector = own(model)
    first = connector.hidden_size if connector.num_blocks else model.vision.feature_size
    return [first] + [model.language.hidden_size] * connector.mlp_depth


def rules(model: ModelConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    connector, tp = own(model), layout.tensor_model_parallel_size
    rows, columns = model.vision.grid
    if connector.output_grid > min(rows, columns):
        yield (
            f"{_OWN}.output_grid: {connector.output_grid} is more than the {rows} x {columns} patches that the tower"
            " makes; lower it"
        )
    yield from divides("model.language.hidden_size", model.language.hidden_size, tp, TP)
    if connector.num_blocks:
        yield from divides(f"{_OWN}.hidden_size", connector.hidden_size, tp, TP)
    sizes = {size_in: inside for size_in, inside, _ in blocks(model)}
    for size_in, inside in sizes.items():
        key = f"{_OWN}.hidden_size" if size_in == connector.hidden_size else "model.vision.hidden_size"
        if inside == 0:
            yield f"{key}: {size_in} channels leave none for a gate, which has a quarter of them; raise it"
        yield from divides(f"{key} {size_in}, a quarter of it", inside, tp, TP)
