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

    drop_first_feature: bool = False
    """Leave out the first feature of each picture, which is that of a patch: as code that counts on a class token does
    behind a tower without one (TinyLLaVA and xtuner on SigLIP). A class token's own is dropped without it."""
    init_method_std: Annotated[float, Meaning.RUN] = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""
    output_multiplier: Annotated[float, Meaning.USE] = Field(default=1.0, gt=0)
    """What the tokens are multiplied by: systems that multiply their language model's embeddings behind the place where
    pictures come in (Bunny on MiniCPM, Mipha on Gemma) multiply both; see model.language.embedding_multiplier."""

    input_expansion: int | None = Field(default=None, gt=0, le=1000)
    """What the first layer gives is so many times as wide as a feature (Cobra's fused projector: 4), and not as the
    language model; null for that. It goes with two layers or more."""

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
    def each_patch(self) -> bool:
        """Not where one of them is missing."""
        return not self.drop_first_feature

    @property
    def spatial(self) -> bool:
        """Not where one of them is missing."""
        return not self.drop_first_feature

    def tokens_of(self, grid: tuple[int, int]) -> int:
        """Return one for each patch, or for each but the first."""
        return grid[0] * grid[1] - int(self.drop_first_feature)

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
    if connector.input_expansion is not None and connector.depth < 2:
        yield f"{_OWN}.input_expansion: {connector.preset} is one layer, which makes tokens; set it to null"
    elif connector.input_expansion is not None:
        tp, width = layout.tensor_model_parallel_size, connector.input_expansion * model.vision.feature_size
        yield from divides(f"{_OWN}.input_expansion", width, tp, TP)
    if connector.drop_first_feature and (model.vision.packed or model.vision.patches_per_image < 2):
        yield (
            f"{_OWN}.drop_first_feature: goes with a tower of equal squares that makes two features of a picture or"
            " more; set it to false"
        )
    if model.vision.packed and model.vision.spatial_merge_size != 1:
        yield (
            f"{_OWN}.preset: {connector.preset} makes a token of each patch, and model.vision.spatial_merge_size"
            f" ({model.vision.spatial_merge_size}) asks for one of each block; set that to 1, or take patch_merger"
        )
    yield from divides("model.language.hidden_size", model.language.hidden_size, layout.tensor_model_parallel_size, TP)


def widths(model: ModelConfig) -> list[int]:
    """Return the width of the features, and of what each layer gives."""
    connector, width = model.connector, model.vision.feature_size
    assert isinstance(connector, MLPConfig)
    given = [model.language.hidden_size] * connector.depth
    if connector.input_expansion is not None:
        given[0] = connector.input_expansion * width
    return [width, *given]


def products(model: ModelConfig, tp: int) -> tuple[tuple[str, int, int], ...]:
    """Return the sizes of the connector's matrix products: key, number, ranks that share it."""
    return (
        ("model.vision.hidden_size", model.vision.feature_size, 1),
        ("model.language.hidden_size", model.language.hidden_size, tp),
        *(("model.connector.input_expansion", width, tp) for width in widths(model)[1:2]),
        ("model.vision.image_size", model.tokens_per_view, 1),
    )
