"""What layouts of one search have in common: each figure is reckoned once for all layouts that it is the same for."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

from megavlm.architectures.cost import layer_kinds
from megavlm.config.schema import LanguageConfig, Recipe
from megavlm.planning.layout import Chunk, Layout

T = TypeVar("T")


class Reckoned:
    """Figures that were reckoned for other layouts.

    Of one recipe, but for the keys of ``parallel`` that a search varies, one number and kind of GPUs, and one load.
    """

    def __init__(self) -> None:
        self._found: dict[Hashable, object] = {}
        self._kinds: tuple[LanguageConfig, ...] | None = None

    def once(self, key: Hashable, reckon: Callable[[], T]) -> T:
        """Return what ``reckon`` gives for ``key``, which names the figure and all that it depends on."""
        try:
            return self._found[key]  # type: ignore[return-value]
        except KeyError:
            found = self._found[key] = reckon()
            return found

    def layers(self, recipe: Recipe, chunk: Chunk) -> Hashable:
        """Return what chunks share whose language layers are of the same kinds, one after the other."""

        def reckon() -> Hashable:
            if self._kinds is None:  # equal kinds are one object, and to hash one takes long
                self._kinds = layer_kinds(recipe.model.language)
            ends = chunk.begin, chunk.begin + chunk.layers
            crossed = tuple(one - chunk.begin for one in recipe.model.language.cross_layers if ends[0] <= one < ends[1])
            kinds = tuple(map(id, self._kinds[slice(*ends)]))
            short: Hashable = (len(kinds), kinds[0]) if len(set(kinds)) == 1 else kinds
            return self.once(("layers", short, crossed), lambda: ("layers", len(self._found)))

        return self.once((chunk.begin, chunk.layers), reckon)


def shards(layout: Layout) -> tuple[int, bool, int, int]:
    """Return what the cost of a layer may ask of a layout (``architectures.cost.Shards``)."""
    return layout.tensor, layout.sequence_parallel, layout.context, layout.expert_tensor


def splits(layout: Layout) -> tuple[int, int | None, int]:
    """Return what tells layouts of one model apart in which layers lie in which chunk."""
    return layout.pipeline, layout.virtual, layout.chunks[0].layers
