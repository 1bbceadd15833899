"""Two towers that see one picture, as one tower: its keys, rules, sizes and cost. Imports no torch.

The first one, ``low``, is a vision transformer, and its keys are those of that tower; those of the second, ``high``,
have ``high_`` in front. So whoever asks for a tower gets one: with one cost, one place on the ranks, one name. A pair
of two kinds is a folder of ``towers/`` that says which.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from megavlm.architectures.cost import Attention, Kernels, Parameter, Passage, Pictures, Product, Work
from megavlm.architectures.towers.vit.config import ViTConfig
from megavlm.architectures.towers.vit.config import products as vit_products
from megavlm.architectures.towers.vit.config import rules as vit_rules
from megavlm.config.fields import Meaning, config_class
from megavlm.config.schema import ParallelConfig, VisionConfig
from megavlm.config.towers import Colours, TowerPart

_OWN, _HIGH = "model.vision", "high_"
_SHARED = ("preset", "tensor_parallel")
"""Keys that both towers have in common."""


def second_keys(config: Any) -> Any:
    """Return a class with the keys of a tower, each with ``high_`` in front."""
    body: dict[str, Any] = {"__module__": __name__, "__annotations__": {}, "__doc__": "Keys of a second tower."}
    for name, info in config.__pydantic_fields__.items():
        if name in _SHARED:
            continue
        text = f"Of the second tower: {info.description}"
        more = {} if info.is_required() else {"default": info.default}
        kind = Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
        body["__annotations__"][_HIGH + name] = kind
        body[_HIGH + name] = Field(**more, description=text)
    return config_class(type(f"Second{config.__name__}", (), body))


@config_class
class PairConfig(ViTConfig):
    """Keys of a pair beside those of its towers."""

    low_from: Literal["plan", "high"] = "plan"
    """Where the first tower's pixels come from: plan (model.image.kind makes a rendering of the picture for each
    tower: fit_pair, crop_squash, squash_pair), or high (the second's, normalised, and made smaller: bilinear, without a
    filter; MiniGemini)."""
    low_tiles: Annotated[int, Meaning.USE] = Field(default=1, gt=0, le=100)
    """With low_from high: tiles across, and down, in which the first tower sees a picture, each of image_size pixels;
    their features stand one tile after the other, row by row (2 in MiniGemini-HD)."""
    low_whole: Annotated[bool, Meaning.USE] = False
    """With low_tiles above 1: the first tower sees the whole picture too, of image_size pixels, and its features stand
    in front of the tiles'; the second's are halved for it, or made smaller by as much as there are tiles."""
    high_to: Literal["connector", "layers"] = "connector"
    """Where the second tower's features go: into the connector, beside the first one's of the same place, or past it to
    the language layers, each of which attends to them (layers: CogAgent; model.language.cross_hidden_size)."""
    frozen_tower: Annotated[Literal["low", "high"] | None, Meaning.RUN] = None
    """Which of the two towers stays as it is while the other is trained: low (the first) or high (the second). Null
    for none; modules.vision.freeze freezes both."""
    high_lr_multiplier: Annotated[float, Meaning.RUN] = Field(default=1.0, gt=0)
    """Factor on the learning rate of the second tower, beside modules.vision.lr_multiplier."""

    @property
    def low(self) -> ViTConfig:
        """The first tower."""
        found: ViTConfig = _part(self, ViTConfig, "")
        return found

    @property
    def high(self) -> Any:
        """The second tower."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its second tower is")

    @property
    def views(self) -> int:
        """What the first tower sees of a picture: itself, or its tiles, and itself."""
        return self.low_tiles**2 + int(self.low_whole)

    @property
    def ungridded(self) -> str | None:
        """Tile after tile, where the first tower sees tiles."""
        return "low_tiles" if self.low_tiles > 1 else None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the first tower's patches: those of all views, one below the other."""
        rows, columns = self.low.grid
        return self.views * rows, columns

    @property
    def ratio(self) -> int:
        """Rows of the second tower's features to one of the first's."""
        return int(self.high.grid[0] // (self.low_tiles * self.low.grid[0]))

    @property
    def feature_sizes(self) -> tuple[int, int]:
        """Width of the first tower's feature, and of all of the second's beside it."""
        return self.low.feature_size, int(self.ratio**2 * self.high.feature_size)

    @property
    def feature_size(self) -> int:
        """Width of what the connector takes: of both side by side."""
        low, high = self.feature_sizes
        return low + (high if self.high_to == "connector" else 0)

    @property
    def features_past(self) -> tuple[int, int]:
        """Those of the second tower, if asked for."""
        return (self.ratio**2, int(self.high.feature_size)) if self.high_to == "layers" else (0, 0)

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of the renderings of a picture: for each tower, or for the second one alone."""
        high = int(self.high.image_size)
        return (self.image_size, high) if self.low_from == "plan" else (high,)

    @property
    def colours(self) -> tuple[Colours, ...]:
        """Those of the renderings."""
        high = self.high
        own = ((self.image_mean, self.image_std), (high.image_mean, high.image_std))
        return own if self.low_from == "plan" else own[1:]

    @property
    def towers(self) -> tuple[TowerPart, ...]:
        """Both."""
        return (
            TowerPart("low.", self.num_layers, 1.0),
            TowerPart("high.", int(self.high.num_layers), self.high_lr_multiplier),
        )


@functools.lru_cache(maxsize=64)
def _part(pair: VisionConfig, kind: Any, prefix: str) -> Any:
    keys = {name: getattr(pair, name if name in _SHARED else prefix + name) for name in kind.__pydantic_fields__}
    return kind(**keys)


def second(pair: VisionConfig, kind: Any) -> Any:
    """Return the second tower's keys, as one of its class."""
    return _part(pair, kind, _HIGH)


def pair_rules(pair: PairConfig, layout: ParallelConfig, second_rules: Any) -> Iterator[str]:
    """Yield what either tower's rules say of it, and what does not go together."""
    before = list(vit_rules(pair.low, layout))
    before += [_named(line) for line in second_rules(pair.high, layout)]
    yield from before
    if before:
        return
    if pair.low_tiles > 1 and pair.low_from == "plan":
        yield (
            f"{_OWN}.low_tiles: the first tower sees tiles of the second one's pixels, and {_OWN}.low_from is plan; set"
            " that to high, or low_tiles to 1"
        )
    if pair.low_whole and pair.low_tiles == 1:
        yield f"{_OWN}.low_whole: the whole picture is seen without tiles; set it to false, or raise {_OWN}.low_tiles"
    rows, more = pair.low_tiles * pair.low.grid[0], pair.high.grid[0]
    if more % rows or more < rows:
        yield (
            f"{_OWN}.{_HIGH}image_size: the second tower makes {more} x {more} features of a picture, which are no"
            f" whole number for each of the first tower's {rows} x {rows} ({_OWN}.image_size"
            + (f", in {pair.low_tiles} x {pair.low_tiles} tiles" if pair.low_tiles > 1 else "")
            + "); change one of the two"
        )
    if pair.high_to == "layers" and pair.low_tiles > 1:
        yield f"{_OWN}.high_to: layers goes with a first tower that sees the whole picture; set {_OWN}.low_tiles to 1"
    if pair.deepstack_layers:
        yield f"{_OWN}.deepstack_layers: goes with one tower, and {pair.preset} has two; set it to []"
    if pair.class_feature:
        yield f"{_OWN}.class_feature: goes with one tower, and {pair.preset} has two; set it to false"
    if pair.frozen_tower == "high" and pair.high_lr_multiplier != 1:
        yield f"{_OWN}.high_lr_multiplier: has no effect with {_OWN}.frozen_tower high; set it to 1, or that to null"
    high = pair.high
    if pair.low_from == "high" and (pair.image_mean, pair.image_std) != (high.image_mean, high.image_std):
        yield (
            f"{_OWN}.low_from: high takes pixels that the second tower's mean and deviation normalised, and those of"
            " the first tower are others; make image_mean and image_std the same, or set it to plan"
        )


def _named(line: str) -> str:
    return line.replace(f"{_OWN}.", f"{_OWN}.{_HIGH}")


def pair_products(pair: PairConfig, tp: int, second_products: Any) -> tuple[tuple[str, int, int], ...]:
    """Return the sizes of both towers' matrix products."""
    high = tuple((_named(key), *sizes) for key, *sizes in second_products(pair.high, tp))
    return (*vit_products(pair.low, tp), *high)


@dataclass(frozen=True)
class PairCost:
    """The cost of a pair, of the costs of its towers: see :class:`megavlm.architectures.cost.TowerCost`."""

    low: Any
    high: Any

    def _each(self, pair: Any, pictures: Pictures) -> list[tuple[str, Any, Any, Pictures]]:
        # A picture has as many features as the first tower makes of it.
        seen = Pictures.alike(pictures.count, pair.high.grid)
        if pair.views > 1:
            pictures = Pictures.alike(pictures.count * pair.views, pair.low.grid)
        return [("low", self.low, pair.low, pictures), ("high", self.high, pair.high, seen)]

    def _learning(self, pair: Any, pictures: Pictures) -> list[tuple[Any, Any, Pictures]]:
        return [rest for name, *rest in self._each(pair, pictures) if name != pair.frozen_tower]  # type: ignore[misc]

    def parameters(self, pair: Any, tensor: int) -> list[Parameter]:
        """Return each parameter, the first tower's first."""
        found = []
        for name, cost, own, _ in self._each(pair, Pictures(0, 0, 0)):
            fixed = name == pair.frozen_tower
            found += [Parameter(one.elements, one.fixed or fixed) for one in cost.parameters(own, tensor)]
        return found

    def work(self, pair: Any, pictures: Pictures) -> Work:
        """Return the operations of a forward pass."""
        found = [cost.work(own, seen) for _, cost, own, seen in self._each(pair, pictures)]
        return Work(*(sum(getattr(one, name) for one in found) for name in ("products", "attention", "whole")))

    def again(self, pair: Any, pictures: Pictures) -> float:
        """Return the operations that the backward pass makes a second time."""
        return float(sum(cost.again(own, seen) for cost, own, seen in self._learning(pair, pictures)))

    def kept(self, pair: Any, tensor: int, pictures: Pictures, kernels: Kernels) -> float:
        """Return the bytes that those that learn keep."""
        parts = self._learning(pair, pictures)
        return float(sum(cost.kept(own, tensor, seen, kernels) for cost, own, seen in parts))

    def passing(self, pair: Any, tensor: int, pictures: Pictures, kernels: Kernels, *, learns: bool) -> float:
        """Return the most bytes that the forward pass needs beyond what it keeps."""
        most = max(
            cost.passing(own, tensor, seen, kernels, learns=learns and name != pair.frozen_tower)
            for name, cost, own, seen in self._each(pair, pictures)
        )
        # Both towers' features, and what they are side by side.
        return float(most + 2 * pictures.patches * sum(pair.feature_sizes) * kernels.number_bytes)

    def rebuilt(self, pair: Any, tensor: int, pictures: Pictures, kernels: Kernels) -> float:
        """Return the bytes that the backward pass needs beside what was kept: one tower's at a time."""
        parts = self._learning(pair, pictures)
        return float(max((cost.rebuilt(own, tensor, seen, kernels) for cost, own, seen in parts), default=0))

    def passage(self, pair: Any, tensor: int, pictures: Pictures, kernels: Kernels) -> Passage:
        """Return what a forward pass takes time for, one tower after the other."""
        found = [cost.passage(own, tensor, seen, kernels) for _, cost, own, seen in self._each(pair, pictures)]
        products: list[Product] = [one for passage in found for one in passage.products]
        attention: list[Attention] = [one for passage in found for one in passage.attention]
        layers, collectives = sum(one.layers for one in found), sum(one.collectives for one in found)
        joined = 4 * pictures.patches * sum(pair.feature_sizes) * kernels.number_bytes
        return Passage(
            products=products,
            attention=attention,
            moved=sum(one.moved for one in found) + joined,
            stream=sum(one.stream * one.layers for one in found) / layers,
            collectives=collectives,
            layers=layers,
        )
