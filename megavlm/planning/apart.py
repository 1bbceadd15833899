"""Tower and connector on all ranks (``parallel.vision_placement``): what a rank encodes of a step, and what that keeps.

Every rank has both whole (or, with ``parallel.vision_shards``, a shard) and a share of the step's pictures of its
replica. What it keeps of them stays through the whole pipeline; the first stage has the features of all of them, and
their gradients. Packs are taken to be alike, so that nothing moves between replicas (``parallel.vision_balance``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megavlm.architectures.cost import cost_of
from megavlm.config.schema import Recipe
from megavlm.planning.activations import kernels_of, vision_kept
from megavlm.planning.layout import Layout
from megavlm.planning.shares import share


@dataclass(frozen=True)
class VisionBytes:
    """Bytes of a rank, of a step's pictures."""

    kept: int
    """From the forward to the backward pass, and features with their gradients."""
    pixels: int
    """Of the rank's own pictures; on the first stage of all that its reader hands out."""
    passing: int
    """Most that comes and goes while it encodes or goes backward, beyond what is kept."""
    following: int
    """With ``parallel.vision_ahead``: pixels and features of its pictures of the next step."""


def alone(layout: Layout) -> Layout:
    """Return the layout that such a tower is built for: nothing of it is cut, but for shards."""
    if layout.together:
        return replace(layout, apart=False, together=False)
    return replace(layout, tensor=1, sequence_parallel=False, apart=False)


def share_of_step(layout: Layout, views: float) -> float:
    """Return the views of the rank that has most, where each micro-batch has ``views``: whole ones."""
    return math.ceil(layout.microbatches * views / layout.places - 1e-9)


def feature_bytes(recipe: Recipe, layout: Layout, views: float) -> float:
    """Return the bytes of the features of a step's pictures, where each micro-batch has ``views``."""
    model = recipe.model
    numbers = model.tokens_per_view * model.language.hidden_size * (1 + model.vision.deepstack)
    return layout.microbatches * views * numbers * kernels_of(recipe).number_bytes


def vision_bytes(recipe: Recipe, layout: Layout, stage: int, views: float, most_views: int) -> VisionBytes:
    """Return what the pictures of a step take on a rank of ``stage``.

    Args:
        recipe: the recipe.
        layout: its layout, with the tower apart.
        stage: the pipeline stage.
        views: of a micro-batch on average: for pixels.
        most_views: of the heaviest one, which every micro-batch is taken to be.
    """
    kernels, own = kernels_of(recipe), share_of_step(layout, most_views)
    learns = not recipe.modules.vision.freeze
    trains = learns or not recipe.modules.connector.freeze
    features = feature_bytes(recipe, layout, most_views)
    # Encoded again for the backward pass, pictures are kept by the piece: about those of a micro-batch.
    again = recipe.parallel.vision_recompute
    at_once = min(own, most_views) if again else own
    graph = vision_kept(recipe, alone(layout), math.ceil(at_once), kernels)
    kept = 0 if again else graph
    # The rank's own, and on the first stage all of them; each with its gradient where there is one.
    kept += round((features / layout.places + features * int(stage == 0)) * (1 + int(trains)))
    pixels = layout.microbatches * views * recipe.model.vision.pixel_bytes
    tower, (ranks, seen) = cost_of(recipe.model, "vision"), share(recipe.model, "vision", alone(layout), at_once)
    passing = tower.passing(recipe.model.vision, ranks, seen, kernels, learns=learns)
    if learns:
        passing = max(passing, tower.rebuilt(recipe.model.vision, ranks, seen, kernels))
    passing += graph if again else 0
    following = round((pixels + features) / layout.places) if recipe.parallel.vision_ahead else 0
    return VisionBytes(kept, round(pixels if stage == 0 else pixels / layout.places), int(passing), following)
