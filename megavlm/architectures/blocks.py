"""Keys and rules of connectors that make one token of a block of patches, as packed towers give them."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from megavlm.config.fields import config_class
from megavlm.config.schema import ConnectorConfig, ModelConfig

_OWN = "model.connector"


@config_class
class BlockConnectorConfig(ConnectorConfig):
    """A connector of the features of pictures of any size, one block after the other."""

    merge_size: int = Field(default=2, gt=0, le=64)
    """Side of the block of patches that becomes one token: the tower's spatial_merge_size."""

    @property
    def packed(self) -> bool:
        """It does."""
        return True

    def tokens_of(self, grid: tuple[int, int]) -> int:
        """Return the number of whole blocks."""
        return (grid[0] // self.merge_size) * (grid[1] // self.merge_size)


def width_of(model: ModelConfig) -> int:
    """Return the width of a block's features side by side."""
    return model.vision.feature_size * int(model.connector.merge_size) ** 2


def block_rules(model: ModelConfig) -> Iterator[str]:
    """Yield a line for each broken rule between such a connector and the tower."""
    side = model.connector.merge_size
    if not model.vision.packed:
        yield (
            f"{_OWN}.preset: {model.connector.preset} takes patches in blocks, and the tower {model.vision.preset!r} "
            "gives them row by row; take pixel_shuffle, or another tower"
        )
    elif model.vision.spatial_merge_size != side:
        yield (
            f"{_OWN}.merge_size: {side} is not model.vision.spatial_merge_size ({model.vision.spatial_merge_size}), in "
            "whose blocks patches come; change one of the two"
        )
