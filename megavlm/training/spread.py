"""Which rank of a replica encodes which picture of a step, with ``parallel.vision_placement: all_ranks``.

Pictures go by what tower and connector cost for them, the dearest first, each to the rank that has least to do: no rank
then has more than 4/3 of the least possible load (Graham, Bounds on multiprocessing timing anomalies, 1969). All ranks
reckon it from the pictures' sizes alone, so nothing has to be said, and a restart finds the same.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from megavlm.architectures.cost import Pictures, cost_of
from megavlm.config.schema import ModelConfig, Recipe

Grid = Sequence[int] | None


def picture_operations(model: ModelConfig, grid: tuple[int, ...] | None) -> float:
    """Return the operations of tower and connector, forward, for one picture or film.

    Args:
        model: the recipe's ``model`` branch.
        grid: frames, rows and columns of its patches; None for a picture of the tower's own size.
    """
    frames, rows, columns = (1, *model.vision.grid) if grid is None else grid
    pictures = Pictures.alike(frames, (rows, columns))
    tower = cost_of(model, "vision").work(model.vision, pictures).total
    return float(tower + cost_of(model, "connector").work(model, pictures).total)


class PictureSpread:
    """Spreads the pictures of a step (a :data:`megavlm.data.device_batch.Spread`).

    Args:
        recipe: the run.
    """

    def __init__(self, recipe: Recipe) -> None:
        parallel = recipe.parallel
        self.ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        self._operations = functools.lru_cache(4096)(functools.partial(picture_operations, recipe.model))

    def __call__(self, grids: Sequence[Sequence[Grid]]) -> list[list[int]]:
        """Return [M][V] the rank that encodes each picture.

        Args:
            grids: [M][V] frames, rows and columns of its patches; None where all pictures are alike.
        """
        costs = [
            (-self._operations(None if grid is None else tuple(grid)), pack, view)
            for pack, views in enumerate(grids)
            for view, grid in enumerate(views)
        ]
        loads = [0.0] * self.ranks
        owners = [[0] * len(views) for views in grids]
        for cost, pack, view in sorted(costs):
            rank = min(range(self.ranks), key=loads.__getitem__)
            owners[pack][view] = rank
            loads[rank] -= cost
        return owners
