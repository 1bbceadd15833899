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

_OWN = "model.vision"
_Second: Any = second_keys(ViTConfig)


@config_class
class ViTViTConfig(PairConfig, _Second):
    """The vision tower: a ViT, and another one, which sees each picture larger."""

    @property
    def high(self) -> ViTConfig:
        """The second tower."""
        found: ViTConfig = second(self, ViTConfig)
        return found


def rules(vision: ViTViTConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    yield from pair_rules(vision, layout, second_rules)
    if vision.high.class_feature or vision.high.deepstack:
        yield (
            f"{_OWN}.high_class_feature, {_OWN}.high_deepstack_layers: go with one tower, and {vision.preset} has two;"
            " set them to false and []"
        )


def products(vision: ViTViTConfig, tp: int) -> tuple[tuple[str, int, int], ...]:
    """Return the sizes of the towers' matrix products: key, number, ranks that share it."""
    return pair_products(vision, tp, second_products)
