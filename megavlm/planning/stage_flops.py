"""Operations of each model chunk on one rank: ``planning.flops`` split over tensor and pipeline parallelism."""

from __future__ import annotations

from dataclasses import dataclass

from megavlm.architectures.cost import Work, attended_squares, cost_of, crossed_work, decoder_cost, layer_kinds
from megavlm.config.schema import Recipe
from megavlm.planning.flops import StepFlops, count_step
from megavlm.planning.layout import Chunk, Layout
from megavlm.planning.shares import Seen, seen_by_layers, share
from megavlm.planning.workload import Workload


@dataclass(frozen=True)
class ChunkFlops:
    """Operations of one forward pass through a chunk on one tensor-parallel rank."""

    layers: float
    """Matrix products of the language layers."""
    attention: float
    """Attention of the language layers, the causal half of it."""
    output: float
    """Output layer, without the rows that pad the vocabulary."""
    tower: float
    """Matrix products of the tower."""
    tower_attention: float
    """Attention of the tower."""
    connector: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.layers + self.attention + self.output + self.tower + self.tower_attention + self.connector


def chunk_flops(
    recipe: Recipe, layout: Layout, chunk: Chunk, *, tokens: int, squared_lengths: float, images: Seen
) -> ChunkFlops:
    """Return the operations of one micro-batch, forward, in one chunk on one rank.

    Args:
        recipe: the recipe.
        layout: its layout.
        chunk: one of the layout's chunks.
        tokens: tokens of the micro-batch.
        squared_lengths: sum of the squares of its samples' lengths.
        images: what the tower sees of it.
    """
    model, tp = recipe.model, layout.tensor
    language = model.language
    output, cost = 2 * tokens * language.hidden_size * language.output_rows, decoder_cost(language)
    crossed, crossing = set(language.cross_layers), Work(0)
    # Without attention.
    layers = sum(
        cost.layer_work(kind, tokens, 0).total
        for number, kind in list(enumerate(layer_kinds(language)))[chunk.begin : chunk.begin + chunk.layers]
        if number not in crossed
    )
    squares = attended_squares(language, tokens, squared_lengths)
    attention = cost.layer_work(language, tokens, squares).attention
    if chunk.attending:
        crossing = crossed_work(model, tokens, seen_by_layers(model, images, layout.context))
    images = images if chunk.encodes else 0.0
    tower_ranks, seen = share(model, "vision", layout, images)
    tower = cost_of(model, "vision").work(model.vision, seen)
    connector_ranks, seen = share(model, "connector", layout, images)
    connector = cost_of(model, "connector").work(model, seen)
    return ChunkFlops(
        layers=(layers + chunk.attending * crossing.products) / tp,
        attention=((chunk.layers - chunk.crossed) * attention + chunk.attending * crossing.attention) / tp,
        output=output / tp * int(chunk.last),
        tower=tower.products / tower_ranks + tower.whole,
        tower_attention=tower.attention / tower_ranks,
        connector=(connector.total - connector.whole) / connector_ranks + connector.whole,
    )


def planned_flops(recipe: Recipe, pack: Workload) -> StepFlops:
    """Return the operations of a step whose packs are all alike."""
    packs = recipe.training.global_batch_size
    squares, positions = round(packs * pack.squared_lengths), packs * pack.tokens
    return count_step(
        recipe,
        tokens=positions,
        squared_lengths=squares,
        positions=positions,
        squared_positions=squares,
        images=round(packs * pack.views) if pack.pictures is None else pack.pictures.times(packs),
    )
