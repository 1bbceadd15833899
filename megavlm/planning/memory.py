"""Memory of every pipeline stage, predicted from the recipe: the function that a plan and ``make gpu-check`` call."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from megavlm.architectures.cost import decoder_cost
from megavlm.config.schema import Recipe
from megavlm.planning.activations import Held, carried_streams, engine_key, held_by, kernels_of
from megavlm.planning.apart import vision_bytes
from megavlm.planning.gpus import FRAGMENTATION, HEADROOM, RESERVED_BYTES, Gpu
from megavlm.planning.layout import Chunk, Layout, layout_of
from megavlm.planning.parameters import StaticBytes, static_bytes
from megavlm.planning.reckoned import Reckoned, shards, splits
from megavlm.planning.schedule import rank_order
from megavlm.planning.workload import Workload, assume_workload


@dataclass(frozen=True)
class StageMemory:
    """Bytes of a rank of one pipeline stage at the peak of a step, by what they are for."""

    weights: int
    """Weights, frozen ones among them."""
    gradients: int
    """fp32 gradient buffers."""
    optimizer: int
    """Master weights and moments, this rank's share."""
    activations: int
    """Kept by the language layers, for all micro-batches under way."""
    vision: int
    """Kept by tower and connector, for all micro-batches under way."""
    output: int
    """Kept by the output layer and the loss."""
    buffers: int
    """What comes and goes: pixels and tokens of a step, gradients, recomputed layers, a frozen tower's activations."""

    @property
    def tensors(self) -> int:
        """All tensors at the peak: what ``torch.cuda.max_memory_allocated`` shows."""
        kept = self.activations + self.vision + self.output + self.buffers
        return self.weights + self.gradients + self.optimizer + kept

    @property
    def total(self) -> int:
        """What the GPU must have: tensors, the allocator's gaps, context and communication."""
        return int(self.tensors * (1 + FRAGMENTATION) + RESERVED_BYTES)


def fits(memory: StageMemory, gpu: Gpu) -> bool:
    """Whether a stage fits the GPU, with headroom."""
    return memory.total <= usable_bytes(gpu)


def usable_bytes(gpu: Gpu) -> float:
    """Return the bytes that a plan may count on."""
    return gpu.memory_bytes * (1 - HEADROOM)


def stage_memory(
    recipe: Recipe, layout: Layout, stage: int, workload: Workload, known: Reckoned | None = None
) -> StageMemory:
    """Return the bytes of a rank of ``stage`` at the peak of a step, with the heaviest pack in every micro-batch."""
    known, whole = known or Reckoned(), workload
    static, place = _static(recipe, layout, stage, known), (shards(layout), splits(layout), layout.microbatches, stage)
    workload = workload.of_rank(layout.context)
    activations, vision, output, passing = known.once(
        ("activations", recipe.parallel.recompute_granularity, *place),
        lambda: _activations(recipe, layout, stage, workload, known),
    )
    buffers = known.once(("buffers", *place), lambda: _buffers(recipe, layout, stage, workload, whole))
    return StageMemory(
        weights=static.weights,
        gradients=static.gradients,
        optimizer=static.optimizer,
        activations=activations,
        vision=vision,
        output=output,
        buffers=buffers + passing,
    )


def least_total(recipe: Recipe, layout: Layout, stage: int, known: Reckoned) -> int:
    """Return the bytes below which the ``total`` of a stage cannot be: what it needs without activations."""
    static = _static(recipe, layout, stage, known)
    return StageMemory(static.weights, static.gradients, static.optimizer, 0, 0, 0, 0).total


def _static(recipe: Recipe, layout: Layout, stage: int, known: Reckoned) -> StaticBytes:
    key = shards(layout), splits(layout), layout.experts, layout.gpus, stage
    return known.once(("static", *key), lambda: static_bytes(recipe, layout, stage, known))


def _activations(
    recipe: Recipe, layout: Layout, stage: int, workload: Workload, known: Reckoned
) -> tuple[int, int, int, int]:
    """Return what a rank of ``stage`` keeps at the peak, of language layers, pictures and output, and what passes."""
    held = [_held(recipe, layout, chunk, workload, known) for chunk in layout.chunks_of(stage)]
    count, passing = _peak(layout, stage, held, known)
    language = sum(n * chunk.language for n, chunk in zip(count, held, strict=True))
    vision = sum(n * chunk.vision for n, chunk in zip(count, held, strict=True))
    output = sum(n * chunk.output for n, chunk in zip(count, held, strict=True))
    if layout.apart:
        own = vision_bytes(recipe, layout, stage, workload.views, workload.most_views)
        vision += own.kept
        if recipe.parallel.vision_ahead:  # the next step's pictures are encoded while the pipeline runs
            vision, passing = vision + own.following, passing + own.passing
        else:
            passing = max(passing, own.passing - language - output)
    return language, vision, output, passing


def _held(recipe: Recipe, layout: Layout, chunk: Chunk, workload: Workload, known: Reckoned) -> Held:
    """Return the bytes of one micro-batch in a chunk; ``workload`` is this rank's part."""
    beside = carried_streams(recipe, layout), chunk.attending, chunk.features_go_on
    place = known.layers(recipe, chunk), chunk.first, chunk.last, chunk.encodes
    return known.once(
        ("held", recipe.parallel.recompute_granularity, shards(layout), *place, *beside),
        lambda: held_by(recipe, layout, chunk, workload.tokens, workload.most_views),
    )


_Moment = tuple[tuple[int, ...], int, bool]
"""Micro-batches that each chunk of a rank keeps, which chunk works, and whether it goes forward."""


def _peak(layout: Layout, stage: int, held: list[Held], known: Reckoned) -> tuple[Sequence[int], int]:
    """Walk through the rank's calls; return the micro-batches that each chunk keeps at the peak, and what passes."""
    # More micro-batches than this fill the pipeline no further.
    microbatches = min(layout.microbatches, 2 * layout.pipeline)
    sizes = [chunk.kept for chunk in held]
    walk = stage, microbatches, layout.pipeline, layout.virtual
    moments = known.once(("moments", *walk), lambda: _moments(*walk))
    if min(sizes) > 0:  # no other moment can be the fullest, then
        moments = known.once(("full moments", *walk), lambda: _fullest(moments))
    best: tuple[int, Sequence[int], int] = (-1, [0] * len(held), 0)
    for kept, chunk, forward in moments:
        passing = held[chunk].forward if forward else held[chunk].backward
        total = passing + sum(map(operator.mul, kept, sizes))
        if total > best[0]:
            best = (total, kept, passing)
    return best[1:]


def _moments(stage: int, microbatches: int, pipeline: int, virtual: int | None) -> list[_Moment]:
    """Return what there is on a rank during its calls, each moment once, in their order."""
    kept = [0] * (virtual or 1)
    found: dict[_Moment, None] = {}
    for work in rank_order(stage, microbatches, pipeline=pipeline, virtual=virtual):
        forward = work.kind == "F"
        if forward:
            kept[work.chunk] += 1
        found.setdefault((tuple(kept), work.chunk, forward))
        if not forward:
            kept[work.chunk] -= 1
    return list(found)


def _fullest(moments: Sequence[_Moment]) -> list[_Moment]:
    """Leave out moments beside another one of the same call, in which each chunk keeps as much or more."""
    most: dict[tuple[int, bool], list[_Moment]] = {}
    for moment in moments:
        found = most.setdefault(moment[1:], [])
        if not any(_within(moment, other) for other in found):
            found[:] = [*(other for other in found if not _within(other, moment)), moment]
    left = {moment for found in most.values() for moment in found}
    return [moment for moment in moments if moment in left]


def _within(one: _Moment, other: _Moment) -> bool:
    return all(map(operator.le, one[0], other[0]))


def _buffers(recipe: Recipe, layout: Layout, stage: int, workload: Workload, whole: Workload) -> int:
    """Return what is there all the time beside weights and activations.

    ``workload`` is this rank's part of the ``whole`` pack, of which all get tokens and pixels.
    """
    vision, b = recipe.model.vision, kernels_of(recipe).number_bytes
    # Tokens, labels, positions and sources of every micro-batch, int64.
    total = layout.microbatches * whole.tokens * 4 * 8
    if layout.apart:
        total += vision_bytes(recipe, layout, stage, workload.views, workload.most_views).pixels
    elif stage == 0:
        total += round(layout.microbatches * whole.views * vision.pixel_bytes)
    if kernels_of(recipe).fp8 and not engine_key(recipe, "fp8_param_gather"):
        # FP8 copies of the layers' weights and of their transposes, made once a step.
        language = recipe.model.language
        layer = sum(decoder_cost(language).layer_parameters(language, layout.tensor))
        total += 2 * layer * sum(chunk.layers for chunk in layout.chunks_of(stage))
    wide = workload.tokens * recipe.model.language.hidden_size * b
    if layout.sequence_parallel:  # the sequence that the linear layers gather
        total += wide
    if layout.pipeline > 1:  # activations and gradients on their way
        total += 2 * (wide // layout.tensor if layout.sequence_parallel else wide)
    return total


def predict(
    recipe: Recipe,
    gpus: int = 1,
    *,
    images_per_pack: float | None = None,
    most_images: int | None = None,
    samples_per_pack: float | None = None,
) -> list[StageMemory]:
    """Return the predicted bytes of a rank of each pipeline stage.

    Args:
        recipe: a checked recipe.
        gpus: processes of the job.
        images_per_pack: images of a pack on average; None assumes some (see ``planning.workload``).
        most_images: images of the heaviest pack; None takes as many as fit.
        samples_per_pack: samples of a pack; None takes one per image.
    """
    workload = assume_workload(recipe, images_per_pack, samples_per_pack, most_images)
    layout = layout_of(recipe, gpus)
    return [stage_memory(recipe, layout, stage, workload) for stage in range(layout.pipeline)]
