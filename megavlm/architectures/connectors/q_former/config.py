"""Keys of the Q-Former, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megavlm.config.fields import Meaning, config_class
from megavlm.config.rules import TP, divides
from megavlm.config.schema import ConnectorConfig, ModelConfig, ParallelConfig

_OWN = "model.connector"


@config_class
class QFormerConfig(ConnectorConfig):
    """Learned queries that go through BERT layers, some of which look at the patches, and one linear layer."""

    num_queries: int = Field(default=32, gt=0, le=1_000_000)
    """Learned queries: the tokens that one picture becomes (Hugging Face: num_query_tokens)."""
    num_layers: int = Field(default=12, gt=0, le=48)
    """Layers between the queries and the linear layer; weight tables have rows for so many."""
    hidden_size: int = Field(default=768, gt=0, le=10_000_000)
    """Width of the queries."""
    num_attention_heads: int = Field(default=12, gt=0, le=100_000)
    """Attention heads; divides hidden_size."""
    ffn_hidden_size: int = Field(default=3072, gt=0, le=10_000_000)
    """Width of the layers' MLP."""
    cross_attention_frequency: int = Field(default=2, gt=0, le=10_000)
    """Every so many layers, from the first one on, one looks at the patches."""
    projection_hidden_size: int | None = Field(default=None, gt=0, le=10_000_000)
    """Width between two linear layers behind the queries, without an activation (TinyGPT-V: 4096); null for one."""
    layernorm_epsilon: float = Field(default=1e-12, gt=0)
    """Epsilon of the norms."""
    trained: Annotated[Literal["all", "projection"], Meaning.RUN] = "all"
    """What learns where the connector does (modules.connector.freeze: false): all of it, or the linear layers behind
    the queries alone, as in MiniGPT-4."""
    init_method_std: Annotated[float, Meaning.RUN] = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""

    @property
    def takes_class_feature(self) -> bool:
        """It looks at features, whatever their number and place."""
        return True

    def tokens_of(self, grid: tuple[int, int]) -> int:
        """Return the queries, whatever the grid."""
        return self.num_queries

    def projected(self, width: int) -> list[int]:
        """Return the widths of what the linear layers behind the queries read and give, ``width`` the last."""
        between = [] if self.projection_hidden_size is None else [self.projection_hidden_size]
        return [self.hidden_size, *between, width]

    def looks(self, layer: int) -> bool:
        """Whether a layer, counted from 0, looks at the patches."""
        return layer % self.cross_attention_frequency == 0


def own(model: ModelConfig) -> QFormerConfig:
    """Return the connector's branch."""
    assert isinstance(model.connector, QFormerConfig)
    return model.connector


def rules(model: ModelConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    connector, tp = own(model), layout.tensor_model_parallel_size
    heads = connector.num_attention_heads
    yield from divides(f"{_OWN}.hidden_size", connector.hidden_size, heads, f"{_OWN}.num_attention_heads")
    yield from divides(f"{_OWN}.num_attention_heads", heads, tp, TP)
    yield from divides(f"{_OWN}.ffn_hidden_size", connector.ffn_hidden_size, tp, TP)
    if connector.projection_hidden_size is None:
        yield from divides("model.language.hidden_size", model.language.hidden_size, tp, TP)
    else:
        yield from divides(f"{_OWN}.projection_hidden_size", connector.projection_hidden_size, tp, TP)


def products(model: ModelConfig, tp: int) -> tuple[tuple[str, int, int], ...]:
    """Return the sizes of the connector's matrix products: key, number, ranks that share it."""
    connector = own(model)
    between = connector.projection_hidden_size
    return (
        *(((f"{_OWN}.projection_hidden_size", between, tp),) if between is not None else ()),
        ("model.vision.hidden_size", model.vision.feature_size, 1),
        ("model.language.hidden_size", model.language.hidden_size, tp),
        ("model.vision.image_size", model.vision.features_per_image, 1),
        (f"{_OWN}.hidden_size", connector.hidden_size, tp),
        (f"{_OWN}.ffn_hidden_size", connector.ffn_hidden_size, tp),
        (f"{_OWN}.num_queries", connector.num_queries, 1),
    )
