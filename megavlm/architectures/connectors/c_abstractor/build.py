"""Honeybee's C-Abstractor (arXiv 2312.06742), which MM1 takes too (arXiv 2403.09611).

Its tokens at the end of a picture (``num_eos_tokens``) and its norm in front (``prenorm``) are not here.

Shape legend: N images, P patches of an image, Q tokens, W width of the tower, C channels, E width of the language
model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavlm.architectures.connectors.c_abstractor.config import blocks, own, widths
from megavlm.architectures.context import BuildContext
from megavlm.config.schema import ModelConfig
from megavlm.layers.convolution import ChannelGate, channel_norm, convolve, depthwise, pointwise, pool, swapped
from megavlm.layers.stack import linear_stack, run_stack

_EPSILON = 1e-5  # timm's LayerNormAct2d, which its RegNet stages make of LayerNorm2d


class RegNetBlock(MegatronModule):
    """timm's ``Bottleneck`` of RegNet (arXiv 2003.13678) as Honeybee asks for it: each channel is a group.

    1 x 1, depthwise 3 x 3, squeeze and excitation, 1 x 1, and the block's input, through a 1 x 1 where the number of
    channels changes; a norm over channels behind each convolution, and SiLU.
    """

    def __init__(self, size_in: int, squeezed: int, channels: int, config: TransformerConfig) -> None:
        super().__init__(config=config)
        self.conv_1 = pointwise(size_in, channels, config)
        self.norm_1 = channel_norm(channels, config, _EPSILON)
        self.conv_2 = depthwise(channels, config)
        self.norm_2 = channel_norm(channels, config, _EPSILON)
        self.gate = ChannelGate(channels, squeezed, config, F.silu, torch.sigmoid)
        self.conv_3 = pointwise(channels, channels, config)
        self.norm_3 = channel_norm(channels, config, _EPSILON)
        self.shortcut: Any = None
        self.shortcut_norm: nn.LayerNorm | None = None
        if size_in != channels:
            self.shortcut = pointwise(size_in, channels, config)
            self.shortcut_norm = channel_norm(channels, config, _EPSILON)

    def forward(self, x_NPC: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return [N, P, C] of features on a grid."""
        y = F.silu(self.norm_1(self.conv_1(x_NPC)[0]))
        y = F.silu(self.norm_2(convolve(self.conv_2, y, grid)))
        y = self.norm_3(self.conv_3(self.gate(y))[0])
        if self.shortcut_norm is not None:
            x_NPC = self.shortcut_norm(self.shortcut(x_NPC)[0])
        return F.silu(y + x_NPC)


class CAbstractor(MegatronModule):
    """[P, N, W] patch features to [Q, N, E] image tokens."""

    def __init__(self, model: ModelConfig, context: BuildContext) -> None:
        connector = own(model)
        config = context.headless_config("connector", model.language.hidden_size, connector.init_method_std)
        super().__init__(config=config)
        self.grid, self.output_grid = model.vision.grid, connector.output_grid
        self.position_embedding: nn.Parameter | None = None
        if connector.position_embedding:
            shape = (model.vision.patches_per_image, model.vision.feature_size)
            self.position_embedding = nn.Parameter(torch.empty(shape, dtype=context.dtype))
            if context.initialize:
                nn.init.normal_(self.position_embedding, std=connector.init_method_std)
        made = [
            (ahead, RegNetBlock(size_in, inside, connector.hidden_size, config))
            for size_in, inside, ahead in blocks(model)
        ]
        self.ahead = nn.ModuleList(block for ahead, block in made if ahead)
        self.behind = nn.ModuleList(block for ahead, block in made if not ahead)
        self.layers = linear_stack(widths(model), config)

    def forward(self, features_PNW: Tensor) -> Tensor:
        """Return [Q, N, E] image tokens of [P, N, W] patch features."""
        x_NPC = swapped(features_PNW)
        if self.position_embedding is not None:
            x_NPC = x_NPC + self.position_embedding
        with get_fp8_context(self.config):  # nothing in bf16
            for block in self.ahead:
                x_NPC = block(x_NPC, self.grid)
            x_NQC = pool(x_NPC, self.grid, self.output_grid)
            for block in self.behind:
                x_NQC = block(x_NQC, (self.output_grid, self.output_grid))
            return swapped(run_stack(self.layers, x_NQC, F.silu))


def build(model: ModelConfig, context: BuildContext) -> CAbstractor:
    """Build the connector (the function that every module of this folder has)."""
    return CAbstractor(model, context)
