"""SAM's image encoder (arXiv 2304.02643) on Megatron-Core's layers, and what makes features of its map.

Convolutions and norms are whole on each tensor-parallel rank, and have the same gradient on all.

Shape legend: N images, P patches of an image, W width of the layers, C channels of a map, H and V its rows and columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavlm.architectures.context import BuildContext
from megavlm.architectures.pixels import Normaliser
from megavlm.architectures.towers.sam.config import SamConfig
from megavlm.layers.activation import BiasActivationMLP
from megavlm.layers.convolution import channel_norm
from megavlm.layers.relative import RelativeAttention, WindowSelfAttention
from megavlm.layers.specs import LayerKind, layer_modules

_NECK_EPSILON = 1e-6


def transformer_config(vision: SamConfig, context: BuildContext) -> TransformerConfig:
    """Return the tower's own TransformerConfig: TP like the language model, no PP, no SP."""
    return TransformerConfig(
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        normalization="LayerNorm",
        layernorm_epsilon=vision.layernorm_epsilon,
        activation_func=F.gelu,
        bias_activation_fusion=False,  # Megatron's GELU is the tanh form, whatever is asked for
        add_bias_linear=True,
        add_qkv_bias=True,
        init_method_std=vision.init_method_std,
        **context.transformer_settings("vision"),
    )


def _layer(vision: SamConfig, config: TransformerConfig, number: int) -> nn.Module:
    """Build a layer. Transformer Engine's attention takes no such bias, and its norm lies where windows are cut."""
    window = vision.window_of(number)
    spec = layer_modules(LayerKind("full"), transformer_engine=False).layer
    attention: Any = spec.submodules.self_attention
    attention.module = WindowSelfAttention
    attention.params = {**attention.params, "side": vision.side, "window": window}
    attention.submodules.core_attention = ModuleSpec(
        module=RelativeAttention, params={"side": vision.side if window is None else window}
    )
    layer: nn.Module = build_module(spec, config=config, layer_number=number + 1)
    BiasActivationMLP.take_over(layer.mlp)
    return layer


class _Neck(nn.Module):
    """1 x 1 and 3 x 3 convolutions, each with a norm over the channels behind it."""

    def __init__(self, vision: SamConfig, config: TransformerConfig) -> None:
        super().__init__()
        width, size, dtype = vision.hidden_size, vision.neck_size, config.params_dtype
        self.conv1 = nn.Conv2d(width, size, 1, bias=False, dtype=dtype)
        self.norm1 = channel_norm(size, config, _NECK_EPSILON)
        self.conv2 = nn.Conv2d(size, size, 3, padding=1, bias=False, dtype=dtype)
        self.norm2 = channel_norm(size, config, _NECK_EPSILON)

    def forward(self, x_NCHV: Tensor) -> Tensor:
        """Return [N, C, H, V]."""
        for convolution, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            x_NCHV = norm(convolution(x_NCHV).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x_NCHV


class SamTower(MegatronModule):
    """Images to features of a map.

    Args:
        vision: the tower's branch of the recipe.
        context: layout, number type, layer implementation.
    """

    def __init__(self, vision: SamConfig, context: BuildContext) -> None:
        config = transformer_config(vision, context)
        super().__init__(config=config)
        self.settings = vision
        self._normalise = Normaliser(vision.image_mean, vision.image_std)
        width, dtype, size = vision.hidden_size, context.dtype, vision.neck_size
        self.conv1 = nn.Conv2d(3, width, vision.patch_size, stride=vision.patch_size, dtype=dtype)
        self.positional_embedding = nn.Parameter(torch.empty(vision.side**2, width, dtype=dtype))
        # Not Megatron-Core's block: its checkpoints want layers whose tables are of one size.
        self.layers = nn.ModuleList(_layer(vision, config, number) for number in range(vision.num_layers))
        self.neck = _Neck(vision, config)
        self.second_neck: Any = None
        self.second_scale: Any = None
        if vision.second_neck_layer is not None:
            self.second_neck = _Neck(vision, config)
            self.second_scale = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.halve1 = nn.Conv2d(size, 2 * size, 3, stride=2, padding=1, bias=False, dtype=dtype)
        self.halve2 = nn.Conv2d(2 * size, 4 * size, 3, stride=2, padding=1, bias=False, dtype=dtype)
        if context.initialize:
            nn.init.normal_(self.positional_embedding, std=vision.init_method_std)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Encode images.

        Args:
            images_NCHW: [N, 3, H, W], uint8 (0..255), or floating point where already normalised.

        Returns:
            [P, N, 4 * C] features, in the number type of the weights.
        """
        x_PNW = self.conv1(self._normalise(images_NCHW, self.conv1.weight.dtype)).flatten(2).permute(2, 0, 1)
        x_PNW = (x_PNW + self.positional_embedding.unsqueeze(1)).contiguous()
        second: Tensor | None = None
        for number, layer in enumerate(self.layers):
            x_PNW = self._run(layer, number, x_PNW)
            if number == self.settings.second_neck_layer:
                second = self._features(self.second_neck, x_PNW)
        features_NCHV = self._features(self.neck, x_PNW)
        if second is not None:
            features_NCHV = features_NCHV + second * self.second_scale
        return features_NCHV.flatten(2).permute(2, 0, 1).contiguous()

    def _run(self, layer: nn.Module, number: int, x_PNW: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            with get_fp8_context(self.config, number):  # nothing in bf16
                result: Tensor = layer(hidden_states=x, attention_mask=None)[0]
            return result

        if self.settings.gradient_checkpointing and self.training and torch.is_grad_enabled():
            result: Tensor = tensor_parallel.checkpoint(run, False, x_PNW)
            return result
        return run(x_PNW)

    def _features(self, neck: nn.Module, x_PNW: Tensor) -> Tensor:
        """Return [N, 4 * C, G, G]; a map is stretched in fp32."""
        side, wanted = self.settings.side, 4 * self.settings.output_grid
        map_NCHV = neck(x_PNW.permute(1, 2, 0).unflatten(2, (side, side)))
        if side != wanted:
            size = (wanted, wanted)
            stretched = F.interpolate(map_NCHV.float(), size=size, mode="bilinear", align_corners=False)
            map_NCHV = stretched.to(map_NCHV.dtype)
        features_NCHV: Tensor = self.halve2(self.halve1(map_NCHV))
        return features_NCHV


def build(vision: SamConfig, context: BuildContext) -> SamTower:
    """Build the tower (the function that every module of this folder has)."""
    return SamTower(vision, context)
