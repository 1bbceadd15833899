"""The order in which the micro-batches of a step go through the pipeline.

All micro-batches have equally many tokens, so later stages take equally long for each. The first stage also runs the
tower over the views of their images, and those differ: in number, or where pictures keep sizes of their own in what the
tower's cost says of these, as attention within a picture grows with the square of its patches. Which order hides that
best depends on the layout: a light micro-batch at the front fills the pipeline sooner; where the first stage is the
slowest, a light one at the end drains it sooner and heavy ones belong where it would wait anyhow. So a few orders are
simulated for every step and the fastest is taken.

The order depends on the recipe and on the images of the step alone, so a restart finds the same one, and a step is
the same sum whatever the order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

from megavlm.architectures.cost import Pictures, attended_squares
from megavlm.config.schema import Recipe
from megavlm.config.split import is_replicated, picture_owners
from megavlm.planning.flops import language_flops, passes, picture_work
from megavlm.planning.layout import stage_layers
from megavlm.planning.schedule import simulate

Times = list[list[float]]
Seen = int | Sequence[Sequence[int]]
"""What the tower sees of a micro-batch: so many views, or pictures of any size: frames, rows, columns of patches."""


class StepOrder:
    """Orders the micro-batches of a step by the work that their images are.

    Args:
        recipe: the run; its layout must be one that can run.
    """

    def __init__(self, recipe: Recipe) -> None:
        parallel = recipe.parallel
        self.pipeline = parallel.pipeline_model_parallel_size
        self.virtual = parallel.virtual_pipeline_model_parallel_size
        self.recipe, self._packed = recipe, recipe.model.vision.packed
        self._language, self._image = _language_work(recipe), picture_work(recipe, 1)
        self._empty = _empty_images(recipe)
        tensor = parallel.tensor_model_parallel_size
        # Of a tower that each tensor-parallel rank holds whole, the others wait for the one with most pictures.
        self._together = tensor if is_replicated(recipe.model, "vision", tensor) else 1

    def __call__(self, images: Sequence[Seen]) -> list[int]:
        """Return the indices of the micro-batches in the order in which to run them.

        Args:
            images: [M] what the tower sees of each micro-batch, in the order in which they were read.
        """
        read = list(range(len(images)))
        if self.pipeline == 1:
            return read
        weights = [self.weight(one) for one in images]
        if len(set(weights)) < 2:
            return read
        forward, backward = self.work(images)

        def seconds(order: Sequence[int]) -> float:
            return self._simulate([forward[index] for index in order], [backward[index] for index in order])

        return min(candidates(weights), key=seconds)

    def weight(self, seen: Seen) -> float:
        """Return how heavy a micro-batch is beside others: its views, or the work of its pictures of any size."""
        return sum(self._pictures(seen)) if self._packed else self._views(seen)

    def seconds(self, images: Sequence[Seen]) -> float:
        """Return how long a step takes, in units of 1e12 operations on one rank (all ranks equally fast)."""
        return self._simulate(*self.work(images))

    def _simulate(self, forward: Times, backward: Times) -> float:
        return simulate(forward, backward, pipeline=self.pipeline, virtual=self.virtual).total

    def work(self, images: Sequence[Seen]) -> tuple[Times, Times]:
        """Return the work of each micro-batch on each model stage, forward and backward.

        Both are [M][S] in 1e12 operations, as :func:`megavlm.planning.schedule.simulate` takes them.
        """
        both: tuple[Times, Times] = ([], [])
        for seen in images:
            for times, stages, tower in zip(both, self._language, self._pictures(seen), strict=True):
                times.append([stages[0] + tower, *stages[1:]])
        return both

    def _pictures(self, seen: Seen) -> tuple[float, float]:
        """Return the first stage's work for the pictures of a micro-batch, forward and backward."""
        if not self._packed:
            views = -(-max(self._views(seen), self._empty) // self._together) * self._together
            forward, backward = self._image
            return views * forward, views * backward
        grids = [] if isinstance(seen, int) else [*map(tuple, seen)]
        if not grids and self._empty:
            side = self.recipe.model.vision.spatial_merge_size
            grids = [(1, side, side)]
        forward, backward = picture_work(self.recipe, Pictures.shown(_busiest(grids, self._together)))
        return forward * self._together, backward * self._together

    @staticmethod
    def _views(seen: Seen) -> int:
        assert isinstance(seen, int), "this tower's views are all of one size"
        return seen


def _busiest(grids: Sequence[tuple[int, ...]], ranks: int) -> Sequence[tuple[int, ...]]:
    """Return the pictures of the rank that has most patches, where each rank holds the whole tower."""
    if ranks == 1 or not grids:
        return grids
    shares: list[list[tuple[int, ...]]] = [[] for _ in range(ranks)]
    for grid, owner in zip(grids, picture_owners([*map(prod, grids)], ranks), strict=True):
        shares[owner].append(grid)
    return max(shares, key=lambda share: sum(map(prod, share)))


def candidates(images: Sequence[float]) -> Iterator[list[int]]:
    """Yield orders to choose from, as indices; the order of reading first.

    Args:
        images: [M] how heavy each micro-batch is: its views, or its tower's work.
    """
    yield list(range(len(images)))
    light = sorted(range(len(images)), key=lambda index: (images[index], index))
    heavy = light[::-1]
    yield light
    yield [light[0], *heavy[:-1]]
    # The lightest in front, then the two halves of the others in turn.
    turns = [light[0]] * len(light)
    half = 1 + len(light) // 2
    turns[1::2], turns[2::2] = heavy[: half - 1], heavy[half - 1 : -1]
    yield turns
    yield light[0::2] + light[1::2][::-1]  # light at both ends
    yield heavy[0::2] + heavy[1::2][::-1]  # heavy at both ends


def _language_work(recipe: Recipe) -> tuple[list[float], list[float]]:
    """Return the language model's work on each stage for one full pack, forward and backward.

    Attention counts as if the pack were one segment: at most a few percent, and the same on every stage.
    """
    language, tokens = recipe.model.language, recipe.data.sequence_length
    squares = round(attended_squares(language, tokens, tokens * tokens))
    one, two = (language_flops(replace(language, num_layers=n), tokens, squares) / 1e12 for n in (1, 2))
    layer, head = two - one, 2 * one - two
    forward = [layers * layer for layers in stage_layers(recipe)]
    learning = passes(recipe)[2] - 1
    recompute = int(recipe.parallel.recompute_granularity == "full")
    backward = [(learning + recompute) * seconds for seconds in forward]
    forward[-1] += head
    backward[-1] += learning * head
    return forward, backward


def _empty_images(recipe: Recipe) -> int:
    """Return how many pictures a micro-batch without images runs: see ``VisionLanguageModel.encode_images``."""
    return int(not (recipe.modules.vision.freeze and recipe.modules.connector.freeze))
