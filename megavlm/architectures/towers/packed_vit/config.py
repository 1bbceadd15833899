"""Keys of a vision transformer on pictures of any size, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megavlm.config.fields import Meaning, config_class
from megavlm.config.rules import TP, divides
from megavlm.config.schema import ParallelConfig, VisionConfig

_OWN = "model.vision"


@config_class
class PackedViTConfig(VisionConfig):
    """The vision tower: a ViT on the patches of pictures of any size, one sequence for all of a micro-batch."""

    image_size: Annotated[int, Meaning.USE] = Field(default=448, gt=0, le=100_000)
    """Side of the square picture that plans and MFU reckon with, in pixels; pictures keep sizes of their own."""
    patch_size: int = Field(gt=0, le=10_000)
    """Side of one patch, in pixels."""
    temporal_patch_size: int = Field(default=2, gt=0, le=64)
    """Frames of one patch; a picture is shown in each of them."""
    spatial_merge_size: int = Field(default=2, gt=0, le=64)
    """Side of the blocks of patches that the connector makes tokens of: patches come block by block."""
    hidden_size: int = Field(gt=0, le=10_000_000)
    """Width of the tower."""
    num_layers: int = Field(gt=0, le=10_000)
    """Number of transformer layers."""
    num_attention_heads: int = Field(gt=0, le=100_000)
    """Attention heads; divides hidden_size."""
    ffn_hidden_size: int = Field(gt=0, le=10_000_000)
    """Width of the MLP."""
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Norms of the tower."""
    layernorm_epsilon: float = Field(default=1e-6, gt=0)
    """Epsilon of the norms."""
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "silu"] = "gelu"
    """Activation of the MLP."""
    gated_mlp: bool = False
    """Whether the MLP has a gate: with silu SwiGLU (Qwen2.5-VL)."""
    add_bias_linear: bool = True
    """Whether the linear layers behind attention and of the MLP have a bias."""
    add_qkv_bias: bool = True
    """Whether queries, keys and values have a bias."""
    conv_bias: bool = False
    """Whether the patch embedding has a bias."""
    rotary_base: float | None = Field(default=10000.0, gt=0)
    """Base of the rotary angles of rows and columns, each in half of a head; null for none."""
    positional_grid: int | None = Field(default=None, gt=0, le=100_000)
    """Side of a learned positional table, which is interpolated to each picture; null for none."""
    positional_interpolation: Literal[
        "bilinear", "bicubic", "antialias", "bicubic_antialias", "bucketed", "bucketed_line"
    ] = "bilinear"
    """With positional_grid: bilinear, with the table's corners on the picture's (Qwen3-VL); bicubic, with the edges of
    both on each other (GLM-4.1V); or as pictures are resized, with the edges of both on each other and a mean of what
    becomes one: antialias (bilinear: SigLIP 2), bicubic_antialias (timm's towers: MiniCPM-V 2.0). Or one row of the
    table, that in which a patch's row and column lie, as parts of the side (bucketed: Idefics2), or its number among
    all, as a part of the table's first line (bucketed_line: MiniCPM-Llama3-V 2.5, as published)."""
    class_token: bool = False
    """Whether each picture has a learned class token, with a learned rotary row of its own (RICE); it is dropped."""
    pre_layernorm: bool = False
    """Norm in front of the layers, and of the positional table (RICE, GLM-4.1V)."""
    post_layernorm: bool = False
    """Norm behind the layers (GLM-4.1V, SigLIP 2)."""
    window_size: int | None = Field(default=None, gt=0)
    """Side in pixels of the windows that patches attend within (Qwen2.5-VL: 112); null for whole pictures."""
    full_attention_layers: tuple[int, ...] = ()
    """With window_size: layers that attend to whole pictures, 0 is the first (fullatt_block_indexes)."""
    deepstack_layers: tuple[int, ...] = ()
    """Layers, counted from 0, whose outputs are added to the images' positions behind the first language layers, in
    this order, each through a connector of its own (Qwen3-VL; Hugging Face: deepstack_visual_indexes)."""
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
        """That it takes pictures of any size."""
        return True

    @property
    def deepstack(self) -> int:
        """Layers that the language model gets beside the last one."""
        return len(self.deepstack_layers)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of the picture that plans reckon with: whole blocks."""
        side = max(self.image_size // (self.patch_size * self.spatial_merge_size), 1) * self.spatial_merge_size
        return side, side

    @property
    def patch_values(self) -> int:
        """Numbers of a patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @property
    def pixel_bytes(self) -> int:
        """Bytes of the patches of the picture that plans reckon with."""
        return self.patches_per_image * self.patch_values

    @property
    def window(self) -> int | None:
        """Side of a window in blocks of patches; None for whole pictures."""
        return None if self.window_size is None else self.window_size // (self.patch_size * self.spatial_merge_size)


def rules(vision: PackedViTConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    if min(vision.image_std) <= 0:
        yield f"{_OWN}.image_std: {list(vision.image_std)} must be above 0, as pixels are divided by it; correct it"
    tp, heads = layout.tensor_model_parallel_size, vision.num_attention_heads
    yield from divides(f"{_OWN}.hidden_size", vision.hidden_size, heads, f"{_OWN}.num_attention_heads")
    yield from divides(f"{_OWN}.num_attention_heads", heads, tp, TP)
    yield from divides(f"{_OWN}.ffn_hidden_size", vision.ffn_hidden_size, tp, TP)
    rotary = vision.rotary_base is not None
    if rotary and vision.hidden_size % heads == 0 and vision.hidden_size // heads % 4:
        yield (
            f"{_OWN}.num_attention_heads: heads of {vision.hidden_size // heads} have no angles for rows and for "
            f"columns, which take a multiple of 4; change it or {_OWN}.hidden_size"
        )
    block = vision.patch_size * vision.spatial_merge_size
    if vision.window_size is not None and vision.window_size < block:
        yield (
            f"{_OWN}.window_size: {vision.window_size} pixels are less than a block of patches ({block}); raise it, or "
            "set it to null"
        )
    full = vision.full_attention_layers
    if full and vision.window_size is None:
        yield (
            f"{_OWN}.full_attention_layers: every layer attends to whole pictures without {_OWN}.window_size; leave it "
            "out"
        )
    if full and not 0 <= min(full) <= max(full) < vision.num_layers:
        last = vision.num_layers - 1
        yield f"{_OWN}.full_attention_layers: {list(full)[:20]} are not all layers from 0 to {last}; correct it"
    if vision.class_token and (vision.window_size is not None or vision.positional_grid is not None or not rotary):
        yield (
            f"{_OWN}.class_token: goes with rotary_base, and without window_size and positional_grid; set it to false, "
            "or change these"
        )
    stacked = vision.deepstack_layers
    if stacked and not 0 <= min(stacked) <= max(stacked) < vision.num_layers:
        last = vision.num_layers - 1
        yield f"{_OWN}.deepstack_layers: {list(stacked)[:20]} are not all layers from 0 to {last}; correct it"
    if stacked and vision.post_layernorm:
        yield f"{_OWN}.deepstack_layers: go without {_OWN}.post_layernorm; set that to false, or this to []"
