"""Keys of MiniCPM-V's resampler, and the rules between them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megavlm.architectures.connectors.resampler.config import ResamplerConfig, head_rules
from megavlm.config.fields import config_class
from megavlm.config.rules import divides
from megavlm.config.schema import ModelConfig, ParallelConfig

_OWN = "model.connector"


@config_class
class Resampler2DConfig(ResamplerConfig):
    """Learned queries that look at the patches of a picture, whose positions are those of its own rows and columns."""

    query_positions: bool = False
    """Whether queries have positions too, those of a square (MiniCPM-V 1.0 and 2.0; not 2.5)."""

    @property
    def packed(self) -> bool:
        """It takes them, and features of equal pictures as well."""
        return True


def own(model: ModelConfig) -> Resampler2DConfig:
    """Return the connector's branch."""
    assert isinstance(model.connector, Resampler2DConfig)
    return model.connector


def rules(model: ModelConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    connector, hidden = own(model), model.language.hidden_size
    for name in ("num_queries", "head_dim"):
        if getattr(connector, name) is None:
            yield f"{_OWN}.{name}: the resampler needs it; set it to a number"
    yield from divides("model.language.hidden_size", hidden, 4, "4, as the resampler's sin-cos positions ask")
    queries = connector.num_queries
    if queries is not None and connector.query_positions and math.isqrt(queries) ** 2 != queries:
        side = math.isqrt(queries)
        yield (
            f"{_OWN}.num_queries: {queries} is not a square number, which {_OWN}.query_positions needs;"
            f" take {side**2 or 1} or {(side + 1) ** 2}"
        )
    yield from head_rules(model, layout)
    if model.vision.packed and model.video.kind != "none":
        yield (
            f"model.video.kind: {model.video.kind} counts a token for each block of patches, and {connector.preset}"
            f" makes {queries} of any; set it to none"
        )
