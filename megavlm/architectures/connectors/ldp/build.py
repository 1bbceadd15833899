"""MobileVLM's connectors: LDP (arXiv 2312.16886) and LDPv2 (arXiv 2402.03766).

Shape legend: N images, P patches of an image, Q tokens, W width of the tower, E width of the language model.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavlm.architectures.connectors.ldp.config import own, squeezed
from megavlm.architectures.context import BuildContext
from megavlm.config.schema import ModelConfig
from megavlm.layers.convolution import ChannelGate, channel_norm, convolve, depthwise, pointwise, pool, swapped
from megavlm.layers.stack import linear_stack, run_stack

_EPSILON = 1e-5  # timm's LayerNormAct2d, which MobileVLM takes


class InvertedResidual(MegatronModule):
    """A block of MobileNet v3 (arXiv 1905.02244) without expansion, with LayerNorm over channels.

    Depthwise 3 x 3, norm, hard swish, squeeze and excitation, 1 x 1, norm; and its input, where the stride is 1.
    """

    def __init__(self, channels: int, config: TransformerConfig, *, stride: int) -> None:
        super().__init__(config=config)
        self.stride = stride
        self.depthwise = depthwise(channels, config, stride=stride)
        self.norm_1 = channel_norm(channels, config, _EPSILON)
        self.gate = ChannelGate(channels, squeezed(channels), config, F.relu, F.hardsigmoid)
        self.project = pointwise(channels, channels, config)
        self.norm_2 = channel_norm(channels, config, _EPSILON)

    def forward(self, x_NPE: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return [N, Q, E] of features on a grid."""
        y = self.gate(F.hardswish(self.norm_1(convolve(self.depthwise, x_NPE, grid))))
        y = self.norm_2(self.project(y)[0])
        return x_NPE + y if self.stride == 1 else y


class LDP(MegatronModule):
    """[P, N, W] patch features to [Q, N, E] image tokens."""

    def __init__(self, model: ModelConfig, context: BuildContext) -> None:
        connector, width, embed = own(model), model.vision.feature_size, model.language.hidden_size
        config = context.headless_config("connector", embed, connector.init_method_std)
        super().__init__(config=config)
        self.grid, self.output_grid = model.vision.grid, connector.output_grid
        self.layers = linear_stack([width, embed, embed], config)
        self.blocks: Any = None
        self.peg: nn.Conv2d | None = None
        if connector.version == 1:
            self.blocks = nn.ModuleList(InvertedResidual(embed, config, stride=stride) for stride in (1, 2))
        else:
            self.peg = depthwise(embed, config, bias=True)

    def forward(self, features_PNW: Tensor) -> Tensor:
        """Return [Q, N, E] image tokens of [P, N, W] patch features."""
        with get_fp8_context(self.config):  # nothing in bf16
            x_NPE = swapped(run_stack(self.layers, features_PNW))
            for block in self.blocks or ():
                x_NPE = block(x_NPE, self.grid)
        if self.peg is not None:
            assert self.output_grid is not None  # its rules
            x_NPE = pool(x_NPE, self.grid, self.output_grid)
            x_NPE = x_NPE + convolve(self.peg, x_NPE, (self.output_grid, self.output_grid))
        return swapped(x_NPE)


def build(model: ModelConfig, context: BuildContext) -> LDP:
    """Build the connector (the function that every module of this folder has)."""
    return LDP(model, context)
