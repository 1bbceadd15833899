"""Keys of what makes tokens of codes: none of its own. What it goes with is checked in ``config/codes.py``."""

from __future__ import annotations

from collections.abc import Iterator

from megavlm.config.fields import config_class
from megavlm.config.schema import ConnectorConfig, ModelConfig, ParallelConfig


@config_class
class CodesConfig(ConnectorConfig):
    """No weights: a tower's codes are tokens of the language model, from model.language.image_tokens on."""

    @property
    def takes_codes(self) -> bool:
        """Codes alone."""
        return True


def rules(model: ModelConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield nothing: it has no keys."""
    yield from ()
