"""How heavy the pictures of a sample are to the first stage: what packs are balanced by.

Pictures of one size are counted. Others differ: by the patches, and as attention within a picture (or a window of it,
or a frame of a film) grows with their square. What they cost says the architecture itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from megavlm.architectures.cost import Pictures
from megavlm.config.schema import Recipe
from megavlm.data.media import ImageLayout
from megavlm.data.packing import Weigh
from megavlm.planning.flops import picture_work

PARTS = 2
"""Parts of the usual picture that weights are whole numbers of. Of finer ones choosing a pack takes longer, in
proportion, and is no better (``benchmarks/native_balance.py``); coarser ones take small pictures for none."""


class Weigher:
    """Weighs the pictures of a sample in parts of the usual picture's work, forward and backward.

    Args:
        recipe: the run; its tower takes pictures of any size.

    Raises:
        NoCostError: its tower or connector has no cost.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._unit = sum(picture_work(recipe, 1)) / PARTS
        self._work = functools.lru_cache(maxsize=4096)(self._work_of)

    def __call__(self, layouts: Sequence[ImageLayout]) -> int:
        """Return the weight of pictures."""
        return round(sum(self._work(grid) for layout in layouts for grid in layout.grids) / self._unit)

    def _work_of(self, grid: tuple[int, int, int]) -> float:
        return sum(picture_work(self.recipe, Pictures.shown([grid])))


def weigher_of(recipe: Recipe) -> Weigh | None:
    """Return what weighs the pictures of a run; None where they are counted, or packs are not balanced."""
    return Weigher(recipe) if recipe.model.vision.packed and recipe.data.balance_images else None
