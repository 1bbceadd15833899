"""The order in which the micro-batches of a step go through the pipeline.

All micro-batches have equally many tokens, so later stages take equally long for each. The first stage also runs the
tower over the views of their images, and those differ. Which order hides that best depends on the layout: a light
micro-batch at the front fills the pipeline sooner; where the first stage is the slowest, a light one at the end drains
it sooner and heavy ones belong where it would wait anyhow. So a few orders are simulated for every step and the fastest
is taken.

The order depends on the recipe and on the images of the step alone, so a restart finds the same one, and a step is
the same sum whatever the order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from megavlm.architectures.cost import Pictures, cost_of
from megavlm.config.schema import Recipe
from megavlm.config.split import is_replicated
from megavlm.planning.flops import image_flops, language_flops, passes
from megavlm.planning.layout import stage_layers
from megavlm.planning.schedule import simulate

Times = list[list[float]]


class StepOrder:
    """Orders the micro-batches of a step by the views of their images.

    Args:
        recipe: the run; its layout must be one that can run.
    """

    def __init__(self, recipe: Recipe) -> None:
        parallel = recipe.parallel
        self.pipeline = parallel.pipeline_model_parallel_size
        self.virtual = parallel.virtual_pipeline_model_parallel_size
        self._language, self._image = _language_work(recipe), _image_work(recipe)
        self._empty: float = _empty_images(recipe)
        # Pictures that keep sizes of their own are counted in patches, and reckoned as so many of the usual size.
        vision, self._unit = recipe.model.vision, 1
        if vision.packed:
            self._unit = vision.patches_per_image
            self._empty /= self._unit
        tensor = parallel.tensor_model_parallel_size
        # Of a tower that each tensor-parallel rank holds whole, the others wait for the one with most pictures.
        self._together = tensor if is_replicated(recipe.model, "vision", tensor) else 1

    def __call__(self, images: Sequence[int]) -> list[int]:
        """Return the indices of the micro-batches in the order in which to run them.

        Args:
            images: [M] views of each micro-batch's images, or their patches where these keep sizes of their own, in the
                order in which they were read.
        """
        read = list(range(len(images)))
        if self.pipeline == 1 or len(set(images)) < 2:
            return read
        return min(candidates(images), key=lambda order: self.seconds([images[index] for index in order]))

    def seconds(self, images: Sequence[int]) -> float:
        """Return how long a step takes, in units of 1e12 operations on one rank (all ranks equally fast)."""
        forward, backward = self.work(images)
        return simulate(forward, backward, pipeline=self.pipeline, virtual=self.virtual).total

    def work(self, images: Sequence[int]) -> tuple[Times, Times]:
        """Return the work of each micro-batch on each model stage, forward and backward.

        Both are [M][S] in 1e12 operations, as :func:`megavlm.planning.schedule.simulate` takes them.
        """
        both: tuple[Times, Times] = ([], [])
        for number in images:
            for times, stages, image in zip(both, self._language, self._image, strict=True):
                seen = -(-max(number / self._unit, self._empty) // self._together) * self._together
                times.append([stages[0] + seen * image, *stages[1:]])
        return both


def candidates(images: Sequence[int]) -> Iterator[list[int]]:
    """Yield orders to choose from, as indices; the order of reading first.

    Args:
        images: [M] views of each micro-batch's images.
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
    one, two = (language_flops(replace(language, num_layers=n), tokens, tokens * tokens) / 1e12 for n in (1, 2))
    layer, head = two - one, 2 * one - two
    forward = [layers * layer for layers in stage_layers(recipe)]
    learning = passes(recipe)[2] - 1
    recompute = int(recipe.parallel.recompute_granularity == "full")
    backward = [(learning + recompute) * seconds for seconds in forward]
    forward[-1] += head
    backward[-1] += learning * head
    return forward, backward


def _image_work(recipe: Recipe) -> tuple[float, float]:
    """Return the first stage's work for one image, forward and backward."""
    vision, connector = (image_flops(recipe.model, part, 1) / 1e12 for part in ("vision", "connector"))
    in_vision, in_connector, _ = passes(recipe)
    tower = recipe.model.vision
    recomputes = cost_of(recipe.model, "vision").again(tower, Pictures.alike(1, tower.grid)) > 0
    again = int(recomputes and in_vision == 3)
    return vision + connector, (in_vision - 1 + again) * vision + (in_connector - 1) * connector


def _empty_images(recipe: Recipe) -> int:
    """Return how many pictures a micro-batch without images runs: see ``VisionLanguageModel.encode_images``."""
    return int(not (recipe.modules.vision.freeze and recipe.modules.connector.freeze))
