"""Keys of GLM-4.1V's connector, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from megavlm.config.fields import Meaning, config_class
from megavlm.config.rules import TP, divides
from megavlm.config.schema import ConnectorConfig, ModelConfig, ParallelConfig

_OWN = "model.connector"


@config_class
class DownsampleMergerConfig(ConnectorConfig):
    """Blocks of patches become one token each: a strided convolution, linear, LayerNorm, GELU, and a SwiGLU MLP."""

    merge_size: int = Field(default=2, gt=0, le=64)
    """Side of the block of patches that becomes one token: the tower's spatial_merge_size."""
    ffn_hidden_size: int = Field(default=13696, gt=0, le=10_000_000)
    """Width of the gated MLP (Hugging Face: vision_config.intermediate_size)."""
    layernorm_epsilon: float = Field(default=1e-5, gt=0)
    """Epsilon of the norm."""
    init_method_std: Annotated[float, Meaning.RUN] = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""

    @property
    def packed(self) -> bool:
        """It does."""
        return True

    def tokens_of(self, grid: tuple[int, int]) -> int:
        """Return the number of whole blocks."""
        return (grid[0] // self.merge_size) * (grid[1] // self.merge_size)


def width_of(model: ModelConfig) -> int:
    """Return the width of a block's features, which the convolution takes."""
    return model.vision.feature_size * int(model.connector.merge_size) ** 2


def rules(model: ModelConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
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
    tp = layout.tensor_model_parallel_size
    yield from divides("model.language.hidden_size", model.language.hidden_size, tp, TP)
    yield from divides(f"{_OWN}.ffn_hidden_size", model.connector.ffn_hidden_size, tp, TP)
