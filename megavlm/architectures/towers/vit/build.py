"""Vision transformers on Megatron-Core layers: Qwen-VL's OpenCLIP tower (arXiv 2308.12966), CLIP, SigLIP, InternViT.

And DINOv2 (2304.07193) with registers (2309.16588), EVA01 (2211.07636), EVA02 (2303.11331), EVA02-CLIP-E (2303.15389).

Shape legend: N images, C colours, P patches of an image, W width of the tower, D width of a head, T = P and the learned
tokens beside them (a class token, registers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.activations import quick_gelu
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megavlm.architectures.context import BuildContext
from megavlm.architectures.positions import resize_table
from megavlm.architectures.towers.vit.config import ViTConfig
from megavlm.layers.activation import BiasActivationMLP, gelu_tanh
from megavlm.layers.scale import LayerScale, NormedSum
from megavlm.layers.specs import LayerKind, Modules, block_submodules, layer_modules
from megavlm.layers.width_norm import (
    QueryValueBiasSelfAttention,
    WidthNormSelfAttention,
    with_input_norm,
    without_bias,
)

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "silu": F.silu,
}


def transformer_config(vision: ViTConfig, context: BuildContext) -> TransformerConfig:
    """Return the tower's own TransformerConfig: TP like the language model, no PP, no SP."""
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        normalization=vision.normalization,
        layernorm_epsilon=vision.layernorm_epsilon,
        activation_func=_ACTIVATIONS[vision.activation],
        gated_linear_unit=vision.gated_mlp,
        rotary_interleaved=vision.rotary_base is not None,
        bias_activation_fusion=False,  # Megatron's is the tanh form, whatever is asked for; ours: BiasActivationMLP
        add_bias_linear=True,
        add_qkv_bias=True,
        init_method_std=vision.init_method_std,
        **(recompute if vision.gradient_checkpointing else {}),
        **context.transformer_settings("vision"),
    )


def _layer_parts(vision: ViTConfig, context: BuildContext) -> Modules:
    """Return the parts of a layer."""
    kind = LayerKind("full", head_dim=vision.hidden_size // vision.num_attention_heads)
    behind = vision.branch_norms == "behind"
    # Transformer Engine's linear layers have the norm in front of them inside; here there is none in front.
    linears: dict[str, Any] | None = {} if behind else None
    modules = layer_modules(kind, transformer_engine=context.transformer_engine, linears=linears)
    parts: Any = modules.layer.submodules
    attention = parts.self_attention
    if behind:
        parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
        config = transformer_config(vision, context)
        normed = ModuleSpec(module=NormedSum, params={"norm": modules.norm, "config": config})
        parts.self_attn_bda = parts.mlp_bda = normed
    if not (vision.add_qkv_bias and vision.key_bias):
        attention.submodules.linear_qkv = without_bias(attention.submodules.linear_qkv)
    if vision.add_qkv_bias and not vision.key_bias:
        attention.module = QueryValueBiasSelfAttention
    if vision.qk_norm == "width":
        attention.module = WidthNormSelfAttention
    if vision.attention_norm:
        attention.submodules.linear_proj = with_input_norm(attention.submodules.linear_proj)
    if vision.mlp_norm:
        parts.mlp.submodules.linear_fc2 = with_input_norm(parts.mlp.submodules.linear_fc2)
    if vision.layer_scale:
        scale = {"hidden_size": vision.hidden_size, "init": vision.layer_scale_init, "dtype": context.dtype}
        parts.self_attn_bda = parts.mlp_bda = ModuleSpec(module=LayerScale, params=scale)
    return modules


class VisionTransformer(MegatronModule):
    """Images to patch features.

    Args:
        vision: the recipe's ``model.vision`` branch.
        context: layout, number type, layer implementation.
    """

    def __init__(self, vision: ViTConfig, context: BuildContext) -> None:
        config = transformer_config(vision, context)
        super().__init__(config=config)
        modules = _layer_parts(vision, context)
        width, dtype = vision.hidden_size, context.dtype

        def norm(epsilon: float | None = None) -> torch.nn.Module:
            return modules.norm(config=config, hidden_size=width, eps=epsilon or vision.layernorm_epsilon)

        self.settings = vision
        self.grid = vision.tile_size // vision.patch_size
        self.scales = vision.s2_scales
        self.image_mean, self.image_std = vision.image_mean, vision.image_std
        self._moments: tuple[Tensor, Tensor] | None = None
        self._angles: Tensor | None = None
        # Pixels that fill no whole patch, right and below, are left out.
        self.conv1 = torch.nn.Conv2d(
            3, width, vision.patch_size, stride=vision.patch_size, bias=vision.conv_bias, dtype=dtype
        )
        # Kept at its own size and interpolated in every forward pass: a larger table could not be exported.
        # With a class token that has a position, that is row 0.
        rows = vision.positional_rows
        self.positional_embedding = torch.nn.Parameter(torch.empty(rows, width, dtype=dtype))
        self.class_embedding = torch.nn.Parameter(torch.empty(width, dtype=dtype)) if vision.class_token else None
        self.register_embedding: Any = None
        if vision.register_tokens:
            self.register_embedding = torch.nn.Parameter(torch.empty(vision.register_tokens, width, dtype=dtype))
        self.ln_pre = norm() if vision.pre_layernorm else None
        self.transformer = TransformerBlock(
            config=config, spec=block_submodules([modules] * vision.num_layers), post_layer_norm=False
        )
        for layer in self.transformer.layers:
            BiasActivationMLP.take_over(layer.mlp)
        self.ln_post = norm(vision.post_layernorm_epsilon) if vision.post_layernorm else None
        self.feature_layers = vision.feature_layers
        if vision.deepstack_layers:
            self.feature_layers = (vision.num_layers, *(number + 1 for number in vision.deepstack_layers))
        self.feature_embedding: Any = None
        if vision.feature_table:
            self.feature_embedding = torch.nn.Parameter(torch.empty(vision.positional_grid**2, width, dtype=dtype))
        tables = self.positional_embedding, self.class_embedding, self.register_embedding, self.feature_embedding
        if context.initialize:
            for parameter in tables:
                if parameter is not None:
                    torch.nn.init.normal_(parameter, std=vision.init_method_std)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Encode images.

        Args:
            images_NCHW: [N, 3, H, W], uint8 (0..255), or floating point where already normalised.

        Returns:
            [P, N, W] features, in the number type of the weights; those of learned tokens are not among them, but with
            ``class_feature`` the class token's is the first of P. With
            ``feature_layers`` they are L times as wide: those of L layers, side by side; with ``deepstack_layers``
            those of the last layer and of these; with ``s2_scales`` those of all sizes of the picture, side by side.
        """
        pixels = self._normalise(images_NCHW)
        if self.scales is None:
            return self._encode(pixels)
        return merge_scales(self._encode(split_scales(pixels, self.scales)), self.scales, self.grid)

    def _encode(self, images_NCHW: Tensor) -> Tensor:
        """Return [P, N, W] features of normalised pictures or tiles."""
        x_TNW = self._embed(images_NCHW)
        if self.ln_pre is not None:
            x_TNW = self.ln_pre(x_TNW)
        x_TNW = self._layers(x_TNW.contiguous())
        left_out = self.settings.tokens - self.settings.class_features
        x_PNW = x_TNW[left_out:] if left_out else x_TNW
        if self.ln_post is not None:
            x_PNW = self.ln_post(x_PNW)
        return x_PNW if self.feature_embedding is None else x_PNW + self.feature_embedding.unsqueeze(1)

    def _layers(self, x_TNW: Tensor) -> Tensor:
        """Return [T, N, W] of the last layer, or [T, N, L * W] of the layers that are taken."""
        if self.feature_layers is None:
            return self.transformer(hidden_states=x_TNW, attention_mask=None, rotary_pos_emb=self._rotary(x_TNW.device))
        taken = {0: x_TNW}
        for number, layer in enumerate(self.transformer.layers, 1):
            x_TNW = self._layer(layer, number, x_TNW)
            if number in self.feature_layers:
                taken[number] = x_TNW
        return torch.cat([taken[number] for number in self.feature_layers], dim=-1)

    def _layer(self, layer: torch.nn.Module, number: int, x_TNW: Tensor) -> Tensor:
        """Run one layer as Megatron-Core's block does, which does not give away what lies between its layers."""

        def run(x: Tensor) -> Tensor:
            with get_fp8_context(self.config, number - 1):  # nothing in bf16
                angles = self._rotary(x.device)
                return layer(hidden_states=x, attention_mask=None, rotary_pos_emb=angles)[0]

        if self.config.recompute_granularity == "full" and self.training and torch.is_grad_enabled():
            return tensor_parallel.checkpoint(run, False, x_TNW)
        return run(x_TNW)

    def _rotary(self, device: torch.device) -> Tensor | None:
        """[T, 1, 1, D] fp32 angles, made once; none of them turns a learned token. None where there are none."""
        vision = self.settings
        if vision.rotary_base is None:
            return None
        if self._angles is None or self._angles.device != device:
            with torch.inference_mode(False), torch.no_grad():
                quarter, cpu = vision.hidden_size // vision.num_attention_heads // 4, torch.device("cpu")
                inverse = 1.0 / vision.rotary_base ** (torch.arange(quarter, dtype=torch.float32, device=cpu) / quarter)
                at = torch.arange(self.grid, dtype=torch.float32, device=cpu)
                at = at if vision.rotary_grid is None else at / self.grid * vision.rotary_grid
                place_PX = torch.stack(torch.meshgrid(at, at, indexing="ij"), dim=-1).flatten(0, 1)
                angles_PD = (place_PX[..., None] * inverse).flatten(1).repeat_interleave(2, dim=-1)
                self._angles = F.pad(angles_PD, (0, 0, vision.tokens, 0))[:, None, None, :].to(device)
        return self._angles

    def _normalise(self, images_NCHW: Tensor) -> Tensor:
        """Return the images in the number type of the weights, normalised where they are uint8."""
        if images_NCHW.dtype is torch.uint8:
            # Not buffers: Megatron's Float16Module would round them to bf16.
            mean_C11, std_C11 = self._mean_and_std(images_NCHW.device)
            images_NCHW = (images_NCHW.float() / 255.0 - mean_C11) / std_C11
        return images_NCHW.to(self.conv1.weight.dtype)

    def _mean_and_std(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """[3, 1, 1] fp32 each, made once: to copy them to the device in every micro-batch is to wait for it."""
        if self._moments is None or self._moments[0].device != device:
            mean, std = (torch.tensor(value).view(3, 1, 1).to(device) for value in (self.image_mean, self.image_std))
            self._moments = mean, std
        return self._moments

    def _embed(self, images_NCHW: Tensor) -> Tensor:
        """Return [T, N, W]: the class token, registers, if there are such, and the patches, with their positions."""
        x_NWhw = self.conv1(images_NCHW)
        x_PNW = x_NWhw.flatten(2).permute(2, 0, 1)
        table: Tensor = self.positional_embedding
        antialias, first = self.settings.positional_antialias, list[Tensor]()
        if self.class_embedding is not None:
            class_W: Tensor = self.class_embedding
            if self.settings.class_position:
                class_W, table = class_W + table[0], table[1:]
            first.append(class_W.expand(1, x_PNW.size(1), -1))
        x_PNW = x_PNW + resize_table(table, self.grid, antialias=antialias).unsqueeze(1)
        if self.register_embedding is not None:
            first.append(self.register_embedding.unsqueeze(1).expand(-1, x_PNW.size(1), -1))
        return torch.cat([*first, x_PNW]) if first else x_PNW


def split_scales(images_NCHW: Tensor, sides: Sequence[int]) -> Tensor:
    """Return the tiles of pictures at several sizes [V, C, t, t], V = N times the tiles of one picture.

    Size by size, tile by tile (row by row), picture by picture. Pictures are resized as S2's public code does: bicubic,
    without a filter against aliasing, computed in fp32.

    Args:
        images_NCHW: at the last of the sizes.
        sides: rising multiples of the first, t.
    """
    tile, found = sides[0], []
    for side in sides:
        x_NCHW = images_NCHW
        if side != x_NCHW.size(-1):
            x_NCHW = F.interpolate(x_NCHW.float(), size=(side, side), mode="bicubic").to(images_NCHW.dtype)
        x_NCrtct = x_NCHW.unflatten(3, (-1, tile)).unflatten(2, (-1, tile))
        found.append(x_NCrtct.permute(2, 4, 0, 1, 3, 5).flatten(0, 2))
    return torch.cat(found)


def merge_scales(features_PVW: Tensor, sides: Sequence[int], grid: int) -> Tensor:
    """Return [P, N, L * W] of the features of :func:`split_scales`' tiles: of L sizes, side by side.

    The tiles of a picture are put together, and this map averaged to the first size's, in fp32.
    """
    counts = [(side // sides[0]) ** 2 for side in sides]
    images = features_PVW.size(1) // sum(counts)
    found = []
    for side, part_PVW in zip(sides, features_PVW.split([images * count for count in counts], dim=1), strict=True):
        k = side // sides[0]
        if k == 1:
            found.append(part_PVW)
            continue
        x_ghkkNW = part_PVW.unflatten(1, (k, k, images)).unflatten(0, (grid, grid))
        # [rows of tiles, rows of a tile] are the rows of the map; so many of them as there are tiles become one.
        x_HHNW = x_ghkkNW.permute(2, 0, 3, 1, 4, 5).flatten(2, 3).flatten(0, 1)
        means = x_HHNW.unflatten(1, (grid, k)).unflatten(0, (grid, k)).float().mean((1, 3))
        found.append(means.flatten(0, 1).to(part_PVW.dtype))
    return torch.cat(found, dim=-1)


def build(vision: ViTConfig, context: BuildContext) -> VisionTransformer:
    """Build the tower (the function that every module of this folder has)."""
    return VisionTransformer(vision, context)
