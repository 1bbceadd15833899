"""Keys of Qwen2-VL's connector, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from megavlm.config.fields import Meaning, config_class
from megavlm.config.rules import TP, divides
from megavlm.config.schema import ConnectorConfig, ModelConfig, ParallelConfig

_OWN = "model.connector"


@config_class
class PatchMergerConfig(ConnectorConfig):
    """Blocks of patches become one token each: a norm, their features side by side, linear, GELU, linear."""

    merge_size: int = Field(default=2, gt=0, le=64)
    """Side of the block of patches that becomes one token: the tower's spatial_merge_size."""
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Norm of each patch's features."""
    norm_after_merge: bool = False
    """Whether the norm is of a block's features side by side, instead of each patch's own (the levels of Qwen3-VL)."""
    layernorm_epsilon: float = Field(default=1e-6, gt=0)
    """Epsilon of the norm."""
    init_method_std: Annotated[float, Meaning.RUN] = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""

    @property
    def level(self) -> PatchMergerConfig:
        """Those of a deepstack have the norm behind the merge, as Qwen3-VL's."""
        return replace(self, norm_after_merge=True)

    @property
    def packed(self) -> bool:
        """It does."""
        return True

    def tokens_of(self, grid: tuple[int, int]) -> int:
        """Return the number of whole blocks."""
        return (grid[0] // self.merge_size) * (grid[1] // self.merge_size)


def width_of(model: ModelConfig) -> int:
    """Return the width of a block's features, and of the first linear layer."""
    return model.vision.feature_size * int(model.connector.merge_size) ** 2


def norm_width(model: ModelConfig) -> int:
    """Return the width of the norm."""
    return width_of(model) if model.connector.norm_after_merge else model.vision.feature_size


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
    yield from divides("model.vision.hidden_size x model.connector.merge_size squared", width_of(model), tp, TP)
