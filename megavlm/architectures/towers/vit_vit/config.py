"""Keys of two vision transformers side by side, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megavlm.architectures.pair import PairConfig, pair_products, pair_rules, second, second_keys
from megavlm.architectures.towers.vit.config import ViTConfig
from megavlm.architectures.towers.vit.config import products as second_products
from megavlm.architectures.towers.vit.config import rules as second_rules
from megavlm.config.fields import config_class
from megavlm.config.schema import ParallelConfig

_Second: Any = second_keys(ViTConfig)


@config_class
class ViTViTConfig(PairConfig, _Second):
    """The vision tower: two ViTs, which see one picture, at one size or at two."""

    @property
    def high(self) -> ViTConfig:
        """The second tower."""
        found: ViTConfig = second(self, ViTConfig)
        return found


def rules(vision: ViTViTConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    for name in ("deepstack_layers", "s2_scales", "class_feature"):
        if getattr(vision.high, name):
            yield f"model.vision.high_{name}: is for a tower that stands alone; leave it out"
            return
    yield from pair_rules(vision, layout, second_rules)


def products(vision: ViTViTConfig, tp: int) -> tuple[tuple[str, int, int], ...]:
    """Return the sizes of the towers' matrix products: key, number, ranks that share it."""
    return pair_products(vision, tp, second_products)
