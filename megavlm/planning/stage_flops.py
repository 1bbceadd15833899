"""Operations of each model chunk on one rank: ``planning.flops`` split over tensor and pipeline parallelism."""

from __future__ import annotations

from dataclasses import dataclass

from megavlm.config.schema import Recipe
from megavlm.planning.flops import connector_flops, language_flops, vision_flops
from megavlm.planning.layout import Chunk, Layout
from megavlm.planning.shares import share


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
    recipe: Recipe, layout: Layout, chunk: Chunk, *, tokens: int, squared_lengths: float, images: float
) -> ChunkFlops:
    """Return the operations of one micro-batch, forward, in one chunk on one rank.

    Args:
        recipe: the recipe.
        layout: its layout.
        chunk: one of the layout's chunks.
        tokens: tokens of the micro-batch.
        squared_lengths: sum of the squares of its samples' lengths.
        images: its images.
    """
    model, tp = recipe.model, layout.tensor
    language, tower = model.language, model.vision
    # Per layer: the whole model without attention, less the output layer.
    output = 2 * tokens * language.hidden_size * language.vocab_size
    layer = (language_flops(language, tokens, 0) - output) / language.num_layers
    attention = 2 * language.num_attention_heads * language.kv_channels * squared_lengths
    images = images if chunk.first else 0
    ranks, seen = share(model, "vision", layout, images)
    connector_ranks, connected = share(model, "connector", layout, images)
    positions = tower.patches_per_image + int(tower.class_token)
    tower_attention = seen * tower.num_layers * 4 * positions**2 * tower.hidden_size
    # The patch embedding is not split: every tensor-parallel rank makes it whole.
    embedding = seen * 2 * tower.patches_per_image * 3 * tower.patch_size**2 * tower.hidden_size
    return ChunkFlops(
        layers=chunk.layers * layer / tp,
        attention=chunk.layers * attention / tp,
        output=output / tp * int(chunk.last),
        tower=(seen * vision_flops(tower, 1) - tower_attention - embedding) / ranks + embedding,
        tower_attention=tower_attention / ranks,
        connector=connected * connector_flops(model, 1) / connector_ranks,
    )
