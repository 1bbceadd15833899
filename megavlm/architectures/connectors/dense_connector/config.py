"""Keys of DenseConnector, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megavlm.config.fields import Meaning, config_class
from megavlm.config.rules import TP, divides
from megavlm.config.schema import ConnectorConfig, ModelConfig, ParallelConfig

_OWN, _LAYERS = "model.connector", "model.vision.feature_layers"


@config_class
class DenseConnectorConfig(ConnectorConfig):
    """Features of several layers of the tower, brought together without weights, then linear layers.

    The layers are those of model.vision.feature_layers.
    """

    integration: Literal["sti", "sci", "dci"] = "dci"
    """How (mm_dense_connector_type): sti (the patches of the first layer, behind them means along the patches of each
    other layer), sci (all layers side by side), or dci (the last layer, beside it the mean of each group of layers)."""
    streams: int = Field(default=2, gt=0, le=1000)
    """What comes to one layer's features: with sti and sci the number of other layers; with dci the number of groups,
    which share all layers equally, from what goes into the first one on; what is left over is in none."""
    pool: int = Field(default=8, gt=0, le=100_000)
    """With sti: patches, one behind the other, whose mean is one token."""
    depth: int = Field(default=2, gt=0, le=99)
    """Linear layers, with GELU between them."""
    init_method_std: Annotated[float, Meaning.RUN] = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""

    def tokens_of(self, grid: tuple[int, int]) -> int:
        """Return one for each patch, and with sti those of the other layers."""
        patches = grid[0] * grid[1]
        return patches + (self.streams * (patches // self.pool) if self.integration == "sti" else 0)


def own(model: ModelConfig) -> DenseConnectorConfig:
    """Return the connector's branch."""
    assert isinstance(model.connector, DenseConnectorConfig)
    return model.connector


def layers_of(model: ModelConfig) -> int:
    """Return from how many layers features come."""
    return len(model.vision.feature_layers or (0,))


def widths(model: ModelConfig) -> list[int]:
    """Return the width of a token in front of the linear layers, and of what each gives."""
    connector, width = own(model), model.vision.feature_size // layers_of(model)
    beside = 0 if connector.integration == "sti" else connector.streams
    return [width * (1 + beside)] + [model.language.hidden_size] * connector.depth


def rules(model: ModelConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    connector, taken = own(model), getattr(model.vision, "feature_layers", None)
    count, last = connector.streams, model.vision.num_layers
    if connector.integration == "dci":
        if taken != tuple(range(last + 1)):
            shown = "null" if taken is None else f"{list(taken)[:20]}"
            yield f"{_LAYERS}: {shown}; {_OWN}.integration dci needs all, [0, 1, .., {last}] in this order; set it so"
        if count > last + 1:
            yield f"{_OWN}.streams: {count} groups are more than the tower's {last + 1} features; lower it"
    elif taken is None or len(taken) != 1 + count:
        shown = "null" if taken is None else f"{len(taken)} layers"
        yield (
            f"{_LAYERS}: {shown}; {_OWN}.integration {connector.integration} needs {1 + count}: the one whose patches"
            f" are all kept, then {_OWN}.streams ({count}) others, as [{last}, 7, 15]; set it so"
        )
    if connector.integration == "sti" and model.vision.patches_per_image < connector.pool:
        yield (
            f"{_OWN}.pool: {connector.pool} are more than the tower's {model.vision.patches_per_image} patches, and"
            " nothing would come of the other layers; lower it"
        )
    tp = layout.tensor_model_parallel_size
    yield from divides("model.language.hidden_size", model.language.hidden_size, tp, TP)


def products(model: ModelConfig, tp: int) -> tuple[tuple[str, int, int], ...]:
    """Return the sizes of the connector's matrix products: key, number, ranks that share it."""
    return (
        ("model.vision.hidden_size", widths(model)[0], 1),
        ("model.language.hidden_size", model.language.hidden_size, tp),
        ("model.vision.image_size", model.tokens_per_view, 1),
    )
