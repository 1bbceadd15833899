"""Keys of a vision transformer on tiles, and the rules between them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated

from pydantic import Field

from megavlm.config.fields import Meaning, config_class
from megavlm.config.rules import TP, divides
from megavlm.config.schema import ParallelConfig, VisionConfig

_OWN = "model.vision"


@config_class
class TiledViTConfig(VisionConfig):
    """The vision tower: a ViT on all tiles of a picture at once, and more layers with gates behind it."""

    image_size: int = Field(default=560, gt=0, le=100_000)
    """Side of one tile, in pixels."""
    patch_size: int = Field(gt=0, le=10_000)
    """Side of one patch, in pixels."""
    hidden_size: int = Field(gt=0, le=10_000_000)
    """Width of the tower."""
    num_layers: int = Field(gt=0, le=10_000)
    """Number of transformer layers, without the gated ones."""
    num_global_layers: int = Field(gt=0, le=10_000)
    """Number of layers behind them whose branches are gated; num_layers at most."""
    num_attention_heads: int = Field(gt=0, le=100_000)
    """Attention heads; divides hidden_size."""
    ffn_hidden_size: int = Field(gt=0, le=10_000_000)
    """Width of the MLP."""
    layernorm_epsilon: float = Field(default=1e-5, gt=0)
    """Epsilon of the layers' norms; that of the two outer ones is 1e-5."""
    max_num_tiles: int = Field(default=4, gt=0, le=256)
    """Tiles that the tower runs for every picture; those that a picture does not fill are padding."""
    intermediate_layers: tuple[int, ...] = ()
    """Layers, counted from 0, whose outputs stand beside the last one's (Hugging Face: intermediate_layers_indices)."""
    image_mean: Annotated[tuple[float, float, float], Meaning.PIXELS] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of red, green and blue that pixels (0 to 1) are normalised with; the default is CLIP's."""
    image_std: Annotated[tuple[float, float, float], Meaning.PIXELS] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of red, green and blue."""
    init_method_std: Annotated[float, Meaning.RUN] = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""
    gradient_checkpointing: Annotated[bool, Meaning.RUN] = False
    """Recompute every layer of the tower in the backward pass, to save activation memory."""

    @property
    def packed(self) -> bool:
        """That its pictures are flat patches, each with the grid of its tiles."""
        return True

    @property
    def temporal_patch_size(self) -> int:
        """Frames of a patch."""
        return 1

    @property
    def spatial_merge_size(self) -> int:
        """Side of the blocks that patches come in."""
        return 1

    @property
    def ratios(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the tiles that a picture may be, in the order of the learned tables."""
        numbers = range(1, self.max_num_tiles + 1)
        return tuple((a, b) for a in numbers for b in numbers if a * b <= self.max_num_tiles)

    @property
    def patches_per_side(self) -> int:
        """Patches along a side of a tile."""
        return self.image_size // self.patch_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of a tile."""
        return self.patches_per_side, self.patches_per_side

    @property
    def tile_features(self) -> int:
        """Features of a tile: its patches', and a class token's."""
        return self.patches_per_side**2 + 1

    @property
    def padded_features(self) -> int:
        """Positions of a tile in the layers: a multiple of 8."""
        return -(-self.tile_features // 8) * 8

    @property
    def feature_size(self) -> int:
        """Width of a feature: the last layer's, and those of layers in between."""
        return self.hidden_size * (1 + len(self.intermediate_layers))

    @property
    def patch_values(self) -> int:
        """Numbers of a patch."""
        return 3 * self.patch_size**2

    @property
    def pixel_bytes(self) -> int:
        """Bytes of the patches of a picture of one tile."""
        return self.patches_per_image * self.patch_values

    def tiles_of(self, patches: Sequence[int]) -> tuple[int, int]:
        """Return the rows and columns of tiles of a picture of so many frames, rows and columns of patches."""
        return patches[1] // self.patches_per_side, patches[2] // self.patches_per_side

    def rows_of(self, patches: Sequence[int]) -> int:
        """Return the features of its tiles."""
        return math.prod(self.tiles_of(patches)) * self.tile_features


def rules(vision: TiledViTConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    if min(vision.image_std) <= 0:
        yield f"{_OWN}.image_std: {list(vision.image_std)} must be above 0, as pixels are divided by it; correct it"
    tp, heads = layout.tensor_model_parallel_size, vision.num_attention_heads
    yield from divides(f"{_OWN}.image_size", vision.image_size, vision.patch_size, f"{_OWN}.patch_size")
    yield from divides(f"{_OWN}.hidden_size", vision.hidden_size, heads, f"{_OWN}.num_attention_heads")
    yield from divides(f"{_OWN}.num_attention_heads", heads, tp, TP)
    yield from divides(f"{_OWN}.ffn_hidden_size", vision.ffn_hidden_size, tp, TP)
    if vision.tile_features % 8 == 0:
        # The published code then takes every position for padding, by its slice [-0:].
        yield (
            f"{_OWN}.image_size: a tile of {vision.tile_features} features needs no padding, which the published masks"
            f" count on; change it or {_OWN}.patch_size"
        )
    if vision.num_global_layers > vision.num_layers:
        yield f"{_OWN}.num_global_layers: {vision.num_global_layers} is more than {_OWN}.num_layers; lower it"
    taken = vision.intermediate_layers
    if taken and not 0 <= min(taken) <= max(taken) < vision.num_layers:
        last = vision.num_layers - 1
        yield f"{_OWN}.intermediate_layers: {list(taken)[:20]} are not all layers from 0 to {last}; correct them"
