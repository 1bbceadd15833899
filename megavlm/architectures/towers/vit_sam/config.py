"""Keys of a vision transformer and SAM's tower side by side, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megavlm.architectures.pair import PairConfig, pair_products, pair_rules, second, second_keys
from megavlm.architectures.towers.sam.config import SamConfig
from megavlm.architectures.towers.sam.config import products as second_products
from megavlm.architectures.towers.sam.config import rules as second_rules
from megavlm.config.fields import config_class
from megavlm.config.schema import ParallelConfig

_Second: Any = second_keys(SamConfig)


@config_class
class ViTSamConfig(PairConfig, _Second):
    """The vision tower: a ViT, and SAM's tower, which sees each picture larger."""

    @property
    def high(self) -> SamConfig:
        """The second tower."""
        found: SamConfig = second(self, SamConfig)
        return found


def rules(vision: ViTSamConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    yield from pair_rules(vision, layout, second_rules)


def products(vision: ViTSamConfig, tp: int) -> tuple[tuple[str, int, int], ...]:
    """Return the sizes of the towers' matrix products: key, number, ranks that share it."""
    return pair_products(vision, tp, second_products)
