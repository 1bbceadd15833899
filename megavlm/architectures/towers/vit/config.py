"""Keys of a vision transformer on square images, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megavlm.config.fields import Meaning, config_class
from megavlm.config.rules import TP, divides
from megavlm.config.schema import ParallelConfig, VisionConfig

_OWN = "model.vision"


@config_class
class ViTConfig(VisionConfig):
    """The vision tower: a ViT on square images, whose output is one feature per patch."""

    image_size: Annotated[int, Meaning.USE] = Field(gt=0, le=100_000)
    """Side of the square that an image is resized to, in pixels; what fills no whole patch is left out."""
    patch_size: int = Field(gt=0, le=10_000)
    """Side of one patch, in pixels."""
    hidden_size: int = Field(gt=0, le=10_000_000)
    """Width of the tower."""
    num_layers: int = Field(gt=0, le=10_000)
    """Number of transformer layers."""
    num_attention_heads: int = Field(gt=0, le=100_000)
    """Attention heads; divides hidden_size."""
    ffn_hidden_size: int = Field(gt=0, le=10_000_000)
    """Width of the MLP."""
    positional_grid: int = Field(gt=0, le=100_000)
    """Side of the learned positional table (the table has positional_grid squared rows, interpolated to the image)."""
    layernorm_epsilon: float = Field(default=1e-6, gt=0)
    """Epsilon of the norms."""
    positional_antialias: bool = False
    """Whether the positional table is interpolated as a picture is resized, with a filter against aliasing (DINOv2 with
    registers)."""
    rotary_base: float | None = Field(default=None, gt=0)
    """Base of the rotary angles of rows and columns, each in half of a head, of neighbouring channels (EVA02); beside
    the table. Null for none."""
    rotary_grid: int | None = Field(default=None, gt=0, le=100_000)
    """With rotary_base: side in patches of the grid that the angles were learned on; that of other pictures is shrunk,
    or stretched, to it. Null leaves the patches' own numbers."""
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "silu"] = "gelu"
    """Activation of the MLP: erf GELU (Qwen-VL, LAION CLIP), its tanh form (SigLIP), x * sigmoid(1.702 x) (OpenAI
    CLIP), or, with a gate, silu (EVA02, DINOv2's giant)."""
    gated_mlp: bool = False
    """Whether the MLP has a gate, to which the activation belongs: with silu SwiGLU."""
    mlp_norm: bool = False
    """LayerNorm inside the MLP, in front of its last layer (EVA02)."""
    attention_norm: bool = False
    """LayerNorm over the results of all heads, in front of attention's last layer (EVA02-CLIP)."""
    branch_norms: Literal["before", "behind"] = "before"
    """Where the two norms of a layer stand: in front of attention and of the MLP, or behind them, over what each gives
    before it is added to the stream (EVA02-CLIP-E)."""
    class_token: bool = False
    """Whether a learned class token goes through the layers beside the patches (CLIP); its output is dropped, unless
    class_feature says else."""
    class_position: bool = True
    """With class_token: whether it has a row of the positional table, in front of the others (not in timm's DINOv2 with
    registers, whose class token has its position in it)."""
    class_feature: bool = False
    """With class_token: its output stands in front of those of the patches, for connectors that look at features
    whatever their place (BLIP-2's Q-Former)."""
    register_tokens: int = Field(default=0, ge=0, le=1000)
    """Learned tokens without a position that go through the layers too, behind the class token (DINOv2); their outputs
    are dropped."""
    conv_bias: bool = False
    """Whether the patch embedding has a bias (SigLIP)."""
    pre_layernorm: bool = True
    """LayerNorm in front of the layers (Qwen-VL, CLIP)."""
    post_layernorm: bool = False
    """LayerNorm behind the layers (SigLIP)."""
    post_layernorm_epsilon: float | None = Field(default=None, gt=0)
    """With post_layernorm: its epsilon, where it is another than that of the other norms (BLIP-2's own code)."""
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Norms of the tower: LayerNorm, or RMSNorm (InternViT-6B)."""
    add_qkv_bias: bool = True
    """Whether queries, keys and values have a bias (not in InternViT-6B); the other linear layers always have one."""
    key_bias: bool = True
    """With add_qkv_bias: whether keys have one too (not in EVA)."""
    qk_norm: Literal["width"] | None = None
    """Norm on queries and on keys: an RMSNorm over all heads together (width: InternViT-6B), or null for none."""
    layer_scale: bool = False
    """Multiply what attention and MLP give by a learned vector each before it is added to the stream (InternViT)."""
    layer_scale_init: Annotated[float, Meaning.RUN] = Field(default=0.1, gt=0)
    """With layer_scale: initial value of these vectors."""
    feature_layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Layers whose outputs are the features, set side by side in this order: 1 is the first layer, 0 what goes into it.
    The highest is num_layers. Null takes the last layer's alone."""
    s2_scales: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Sides, in pixels, at which each picture is seen (S2, arXiv 2403.13044; Bunny 1.1), rising: the first is a tile's,
    each of the others a multiple of it, the last is image_size. A larger picture is seen tile by tile, and its features
    averaged down to the first one's; those of all sizes lie side by side. Null for image_size alone."""
    deepstack_layers: tuple[int, ...] = ()
    """Layers, counted from 0, whose outputs are added to the images' positions behind the first language layers, in
    this order, each through a connector of its own (Qwen3-VL; Hugging Face: deepstack_visual_indexes)."""
    feature_table: bool = False
    """Whether a learned vector of each patch's place is added to its feature, behind the layers (CogAgent's pos_embed);
    positional_grid is then the side of that table too, and that of the patches."""
    image_mean: Annotated[tuple[float, float, float], Meaning.PIXELS] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of red, green and blue that pixels (0 to 1) are normalised with; the default is CLIP's."""
    image_std: Annotated[tuple[float, float, float], Meaning.PIXELS] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of red, green and blue."""
    init_method_std: Annotated[float, Meaning.RUN] = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""
    gradient_checkpointing: Annotated[bool, Meaning.RUN] = False
    """Recompute every layer of the tower in the backward pass, to save activation memory."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of whole patches."""
        side = self.tile_size // self.patch_size
        return side, side

    @property
    def tile_size(self) -> int:
        """Side of what goes through the layers, in pixels."""
        return self.image_size if self.s2_scales is None else self.s2_scales[0]

    @property
    def tiles(self) -> int:
        """What goes through the layers of one picture: itself, or the tiles of all its sizes."""
        return sum((side // self.tile_size) ** 2 for side in self.s2_scales or (self.tile_size,))

    @property
    def positional_rows(self) -> int:
        """Rows of the positional table."""
        return self.positional_grid**2 + int(self.class_token and self.class_position)

    @property
    def deepstack(self) -> int:
        """Layers that the language model gets beside the last one."""
        return len(self.deepstack_layers)

    @property
    def feature_size(self) -> int:
        """Width of a patch's features, of all layers that they are taken from and all sizes of the picture."""
        return self.hidden_size * len(self.feature_layers or (0,)) * len(self.s2_scales or (0,))

    @property
    def tokens(self) -> int:
        """Learned tokens beside the patches: the class token, and registers."""
        return int(self.class_token) + self.register_tokens

    @property
    def class_features(self) -> int:
        """That of the class token, if asked for."""
        return int(self.class_feature)

    @property
    def positions(self) -> int:
        """Positions of one picture, or tile, inside the tower: its patches, and the learned tokens."""
        return self.patches_per_image + self.tokens


def rules(vision: ViTConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    if min(vision.image_std) <= 0:
        yield f"{_OWN}.image_std: {list(vision.image_std)} must be above 0, as pixels are divided by it; correct it"
    tp = layout.tensor_model_parallel_size
    # Not that it be a multiple: SigLIP's 384 pixels hold 27 patches of 14, and what is left over is not looked at.
    key = "image_size" if vision.s2_scales is None else "s2_scales"
    if vision.tile_size < vision.patch_size:
        yield (
            f"{_OWN}.{key}: {vision.tile_size} is smaller than one patch"
            f" ({_OWN}.patch_size {vision.patch_size}); raise it"
        )
    yield from _scales(vision)
    yield from _feature_table(vision)
    heads = vision.num_attention_heads
    yield from divides(f"{_OWN}.hidden_size", vision.hidden_size, heads, f"{_OWN}.num_attention_heads")
    yield from divides(f"{_OWN}.num_attention_heads", heads, tp, TP)
    yield from divides(f"{_OWN}.ffn_hidden_size", vision.ffn_hidden_size, tp, TP)
    yield from _layers(vision)
    taken = vision.feature_layers
    if taken is not None and (min(taken) < 0 or max(taken) != vision.num_layers):
        yield (
            f"{_OWN}.feature_layers: {list(taken)[:20]}; the highest must be {_OWN}.num_layers ({vision.num_layers}),"
            " the lowest 0 or more; correct one"
        )
    if taken is not None and vision.post_layernorm:
        yield (
            f"{_OWN}.feature_layers: goes without {_OWN}.post_layernorm, which follows the last layer alone; set"
            " feature_layers to null or post_layernorm to false"
        )
    stacked = vision.deepstack_layers
    if stacked and not 0 <= min(stacked) <= max(stacked) < vision.num_layers:
        yield (
            f"{_OWN}.deepstack_layers: {list(stacked)[:20]} are not all layers from 0 to {vision.num_layers - 1};"
            " correct it"
        )
    if stacked and (taken is not None or vision.post_layernorm):
        yield (
            f"{_OWN}.deepstack_layers: go without {_OWN}.feature_layers and {_OWN}.post_layernorm; set these to null"
            " and false, or this to []"
        )


def _layers(vision: ViTConfig) -> Iterator[str]:
    """Yield what is wrong with the parts of a layer."""
    heads = vision.num_attention_heads
    width = vision.hidden_size // heads if vision.hidden_size % heads == 0 else 4
    if vision.rotary_base is not None and width % 4:
        yield (
            f"{_OWN}.num_attention_heads: heads of {width} have no angles for rows and for columns, which take a"
            f" multiple of 4; change it or {_OWN}.hidden_size"
        )
    if vision.rotary_grid is not None and vision.rotary_base is None:
        yield f"{_OWN}.rotary_grid: there are no angles without {_OWN}.rotary_base; leave it out, or set that"
    if vision.class_feature and (not vision.class_token or vision.register_tokens or vision.s2_scales is not None):
        yield (
            f"{_OWN}.class_feature: needs {_OWN}.class_token, without {_OWN}.register_tokens and {_OWN}.s2_scales; set"
            " it to false, or these to true, 0 and null"
        )
    if not vision.class_position and not vision.class_token:
        yield f"{_OWN}.class_position: there is no class token without {_OWN}.class_token; leave it out"
    if vision.post_layernorm_epsilon is not None and not vision.post_layernorm:
        yield f"{_OWN}.post_layernorm_epsilon: there is no such norm without {_OWN}.post_layernorm; leave it out"
    if vision.branch_norms == "behind" and vision.layer_scale:
        yield f"{_OWN}.branch_norms: behind goes without {_OWN}.layer_scale; set that to false, or this to before"
    if not vision.key_bias and not vision.add_qkv_bias:
        yield f"{_OWN}.key_bias: nothing has a bias without {_OWN}.add_qkv_bias; leave it out"
    if not vision.key_bias and vision.qk_norm is not None:
        yield f"{_OWN}.key_bias: false goes without {_OWN}.qk_norm; set that to null"
    if (vision.activation == "silu") != vision.gated_mlp:
        yield (
            f"{_OWN}.activation: {vision.activation} goes {'without' if vision.gated_mlp else 'with'}"
            f" {_OWN}.gated_mlp; silu has a gate here and the others have none: change one of the two"
        )


def _feature_table(vision: ViTConfig) -> Iterator[str]:
    """Yield what is wrong with a table that is added to features."""
    if not vision.feature_table:
        return
    side = vision.grid[0]
    if vision.positional_grid != side:
        yield (
            f"{_OWN}.feature_table: has a row for each patch, and pictures have {side} x {side}, where"
            f" {_OWN}.positional_grid is {vision.positional_grid}; set that to {side}, or feature_table to false"
        )
    if vision.feature_layers is not None or vision.s2_scales is not None or vision.class_feature or vision.deepstack:
        yield (
            f"{_OWN}.feature_table: goes with the features of the last layer's patches alone; set"
            f" {_OWN}.feature_layers, {_OWN}.s2_scales to null, {_OWN}.class_feature to false and"
            f" {_OWN}.deepstack_layers to [], or feature_table to false"
        )


def _scales(vision: ViTConfig) -> Iterator[str]:
    """Yield what is wrong with the sizes at which a picture is seen."""
    sides = vision.s2_scales
    if sides is None:
        return
    shown = f"{_OWN}.s2_scales: {list(sides)[:20]}"
    if min(sides) < 1 or list(sides) != sorted(set(sides)) or any(side % sides[0] for side in sides):
        yield f"{shown}; each must be larger than the one before it and a multiple of the first; correct them"
    elif sides[-1] != vision.image_size:
        yield (
            f"{shown}; the last must be {_OWN}.image_size ({vision.image_size}), to which pictures are resized; change"
            " one of the two"
        )
    if vision.feature_layers is not None or vision.deepstack_layers:
        yield (
            f"{_OWN}.s2_scales: goes with the features of the last layer alone; set {_OWN}.feature_layers to null and"
            f" {_OWN}.deepstack_layers to [], or s2_scales to null"
        )


def products(vision: ViTConfig, tp: int) -> tuple[tuple[str, int, int], ...]:
    """Return the sizes of the tower's matrix products: key, number, ranks that share it."""
    return (
        (f"{_OWN}.hidden_size", vision.hidden_size, 1),
        (f"{_OWN}.hidden_size", vision.hidden_size, tp),
        (f"{_OWN}.ffn_hidden_size", vision.ffn_hidden_size, tp),
        (f"{_OWN}.image_size", vision.positions, 1),
    )
