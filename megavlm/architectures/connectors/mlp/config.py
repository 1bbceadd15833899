"""Keys of LLaVA's connectors, and the rules between them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from megavlm.config.fields import Meaning, config_class
from megavlm.config.rules import TP, divides
from megavlm.config.schema import ConnectorConfig, ModelConfig, ParallelConfig

_OWN = "model.connector"
_DEEPEST = 99


@config_class
class MLPConfig(ConnectorConfig):
    """One linear layer, or several with GELU between them: one token per patch."""

    init_method_std: Annotated[float, Meaning.RUN] = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""

    @property
    def packed(self) -> bool:
        """It looks at no patch's neighbours."""
        return True

    @property
    def depth(self) -> int:
        """Number of linear layers: 1 for ``linear``, N for ``mlpNx_gelu``."""
        match = re.fullmatch(r"mlp([0-9]+)x_gelu", self.preset)
        return int(match[1][:4]) if match else 1  # more digits are too many layers anyway

    @property
    def sequential(self) -> bool:
        """Whether its layers are numbered, as LLaVA's trainer does for all but ``linear``."""
        return self.preset != "linear"


def rules(model: ModelConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    connector = model.connector
    assert isinstance(connector, MLPConfig)
    if connector.depth > _DEEPEST:
        yield (f"{_OWN}.preset: {connector.preset[:40]} has more layers than a connector has; take at most {_DEEPEST}")
    if model.vision.packed and model.vision.spatial_merge_size != 1:
        yield (
            f"{_OWN}.preset: {connector.preset} makes a token of each patch, and model.vision.spatial_merge_size"
            f" ({model.vision.spatial_merge_size}) asks for one of each block; set that to 1, or take patch_merger"
        )
    yield from divides("model.language.hidden_size", model.language.hidden_size, layout.tensor_model_parallel_size, TP)


def products(model: ModelConfig, tp: int) -> tuple[tuple[str, int, int], ...]:
    """Return the sizes of the connector's matrix products: key, number, ranks that share it."""
    return (
        ("model.vision.hidden_size", model.vision.feature_size, 1),
        ("model.language.hidden_size", model.language.hidden_size, tp),
        ("model.vision.image_size", model.vision.patches_per_image, 1),
    )
