"""Keys of SAM's image encoder (arXiv 2304.02643) with convolutions behind it, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from megavlm.config.fields import Meaning, config_class
from megavlm.config.rules import TP, divides
from megavlm.config.schema import ParallelConfig, VisionConfig

_OWN = "model.vision"


@config_class
class SamConfig(VisionConfig):
    """The vision tower: SAM's ViT on large squares, most of its layers in windows; a neck, and two convolutions.

    Each convolution halves the map and doubles its channels.
    """

    image_size: int = Field(gt=0, le=100_000)
    """Side of the square that an image is resized to, in pixels: that of the tables of positions."""
    patch_size: int = Field(gt=0, le=10_000)
    """Side of one patch, in pixels."""
    hidden_size: int = Field(gt=0, le=10_000_000)
    """Width of the layers."""
    num_layers: int = Field(gt=0, le=10_000)
    """Number of transformer layers."""
    num_attention_heads: int = Field(gt=0, le=100_000)
    """Attention heads; divides hidden_size."""
    ffn_hidden_size: int = Field(gt=0, le=10_000_000)
    """Width of the MLP."""
    window_size: int = Field(gt=0, le=10_000)
    """Side of a window, in patches: windows at the right and below are filled with zeros."""
    global_layers: tuple[int, ...] = ()
    """Layers, counted from 0, that attend to the whole picture."""
    neck_size: int = Field(gt=0, le=1_000_000)
    """Channels of the neck's map; the features have four times as many."""
    output_grid: int = Field(gt=0, le=10_000)
    """Side of the map of features. The neck's map is stretched to four times that in front of the convolutions, unless
    it is as large."""
    second_neck_layer: int | None = Field(default=None, ge=0)
    """Layer, counted from 0, whose output goes through a neck of its own and the same convolutions, is multiplied by a
    learned number and added (DeepSeek-VL: the first global one). Null for none."""
    layernorm_epsilon: float = Field(default=1e-6, gt=0)
    """Epsilon of the norms of the layers; the neck's have 1e-6."""
    image_mean: Annotated[tuple[float, float, float], Meaning.PIXELS] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of red, green and blue that pixels (0 to 1) are normalised with; the default is CLIP's, as DeepSeek-VL's."""
    image_std: Annotated[tuple[float, float, float], Meaning.PIXELS] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of red, green and blue."""
    init_method_std: Annotated[float, Meaning.RUN] = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""
    gradient_checkpointing: Annotated[bool, Meaning.RUN] = False
    """Recompute every layer of the tower in the backward pass, to save activation memory."""

    @property
    def side(self) -> int:
        """Rows of patches."""
        return self.image_size // self.patch_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the features."""
        return self.output_grid, self.output_grid

    @property
    def feature_size(self) -> int:
        """Channels of the last convolution."""
        return 4 * self.neck_size

    def window_of(self, layer: int) -> int | None:
        """Return the side of a layer's windows; None where it attends to the whole picture."""
        return None if layer in self.global_layers else self.window_size


def rules(vision: SamConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    if min(vision.image_std) <= 0:
        yield f"{_OWN}.image_std: {list(vision.image_std)} must be above 0, as pixels are divided by it; correct it"
    yield from divides(f"{_OWN}.image_size", vision.image_size, vision.patch_size, f"{_OWN}.patch_size")
    heads, tp = vision.num_attention_heads, layout.tensor_model_parallel_size
    yield from divides(f"{_OWN}.hidden_size", vision.hidden_size, heads, f"{_OWN}.num_attention_heads")
    yield from divides(f"{_OWN}.num_attention_heads", heads, tp, TP)
    yield from divides(f"{_OWN}.ffn_hidden_size", vision.ffn_hidden_size, tp, TP)
    last = vision.num_layers - 1
    whole = vision.global_layers
    if whole and not 0 <= min(whole) <= max(whole) <= last:
        yield f"{_OWN}.global_layers: {list(whole)[:20]} are not all layers from 0 to {last}; correct it"
    if vision.second_neck_layer is not None and vision.second_neck_layer > last:
        yield f"{_OWN}.second_neck_layer: {vision.second_neck_layer} is not a layer from 0 to {last}; correct it"


def products(vision: SamConfig, tp: int) -> tuple[tuple[str, int, int], ...]:
    """Return the sizes of the tower's matrix products: key, number, ranks that share it."""
    return (
        (f"{_OWN}.hidden_size", vision.hidden_size, 1),
        (f"{_OWN}.hidden_size", vision.hidden_size, tp),
        (f"{_OWN}.ffn_hidden_size", vision.ffn_hidden_size, tp),
        (f"{_OWN}.image_size", vision.side**2, 1),
    )
