"""Keys of Qwen2-VL's connector, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from megavlm.architectures.blocks import BlockConnectorConfig, block_rules, width_of
from megavlm.config.fields import Meaning, config_class
from megavlm.config.rules import TP, divides
from megavlm.config.schema import ModelConfig, ParallelConfig

_OWN = "model.connector"


@config_class
class PatchMergerConfig(BlockConnectorConfig):
    """Blocks of patches become one token each: a norm, their features side by side, linear, GELU, linear."""

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


def norm_width(model: ModelConfig) -> int:
    """Return the width of the norm."""
    return width_of(model) if model.connector.norm_after_merge else model.vision.feature_size


def rules(model: ModelConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    yield from block_rules(model)
    tp = layout.tensor_model_parallel_size
    yield from divides("model.vision.hidden_size x model.connector.merge_size squared", width_of(model), tp, TP)
