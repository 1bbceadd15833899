"""Which ranks encode which picture of a step, with ``parallel.vision_placement: all_ranks``.

Pictures go by what tower and connector cost for them, the dearest first, each to the place that has least to do: none
then has more than 4/3 of the least possible load (Graham, Bounds on multiprocessing timing anomalies, 1969). With
``parallel.vision_balance: job`` a picture leaves its replica only where that has no place for it below the job's mean
(or below the dearest picture, if that is more): what moves is what a replica has too much. All ranks reckon it from
the pictures' sizes alone, so nothing has to be said, and a restart finds the same.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megavlm.architectures.cost import Pictures, cost_of
from megavlm.config.schema import ModelConfig, Recipe

if TYPE_CHECKING:
    from megavlm.data.device_batch import Grid
    from megavlm.parallel.encoders import Encoders

_ROUNDING = 1e-9


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
        self._parallel = parallel = recipe.parallel
        self.places = parallel.pipeline_model_parallel_size
        if parallel.vision_shards == "whole":
            self.places *= parallel.tensor_model_parallel_size
        self._operations = functools.lru_cache(4096)(functools.partial(picture_operations, recipe.model))

    def encoders(self) -> Encoders:
        """Return the ranks that it spreads pictures over."""
        from megavlm.parallel.encoders import encoders_of  # noqa: PLC0415 - imports torch; plans spread pictures too

        return encoders_of(self._parallel)

    def __call__(self, grids: Sequence[Sequence[Sequence[Grid]]]) -> list[list[list[int]]]:
        """Return [D][M][V] the place that encodes each picture.

        Args:
            grids: [D][M][V] frames, rows and columns of its patches; None where all pictures are alike. Of each
                replica that shares its pictures out with others, or of one.
        """
        costs = [
            (-self._operations(None if grid is None else tuple(grid)), pack, view, replica)
            for replica, packs in enumerate(grids)
            for pack, views in enumerate(packs)
            for view, grid in enumerate(views)
        ]
        owners = [[[0] * len(views) for views in packs] for packs in grids]
        if not costs:
            return owners
        loads = [0.0] * (self.places * len(grids))
        dearest = -min(cost for cost, *_ in costs)
        limit = max(-sum(cost for cost, *_ in costs) / len(loads), dearest) * (1 + _ROUNDING)
        waiting = [(0.0, place) for place in range(len(loads))]  # by load; what is out of date is passed over
        for cost, pack, view, replica in sorted(costs):
            place = min(range(replica * self.places, (replica + 1) * self.places), key=loads.__getitem__)
            if len(grids) > 1 and loads[place] - cost > limit:
                while waiting[0][0] != loads[waiting[0][1]]:
                    heapq.heappop(waiting)
                if waiting[0][0] < loads[place]:
                    place = waiting[0][1]
            owners[replica][pack][view] = place
            loads[place] -= cost
            heapq.heappush(waiting, (loads[place], place))
        return owners
