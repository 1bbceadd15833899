"""InternVL's connector (arXiv 2404.16821, "pixel shuffle"): k x k patches become one token.

Shape legend: N images, P patches of an image in r rows and c columns, k side of a square, Q = P / k^2 tokens, W width
of the tower, E width of the language model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megavlm.architectures.connectors.pixel_shuffle.config import PixelShuffleConfig, width_of
from megavlm.architectures.context import BuildContext
from megavlm.config.schema import ModelConfig
from megavlm.layers.linear import column_linear, row_linear

_EPSILON = 1e-5  # torch's own, which InternVL takes


def squares_of(features_PNW: Tensor, grid: tuple[int, int], factor: int) -> Tensor:
    """Return [Q, N, k * k * W]: the features of each square of patches, row by row, side by side.

    Args:
        features_PNW: row by row of ``grid``.
        grid: rows and columns of patches.
        factor: k.
    """
    rows, columns = grid
    x_rkckNW = features_PNW.unflatten(0, (rows // factor, factor, columns // factor, factor))
    return x_rkckNW.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 1)


class PixelShuffleConnector(MegatronModule):
    """[P, N, W] patch features to [Q, N, E] image tokens."""

    def __init__(self, model: ModelConfig, context: BuildContext) -> None:
        connector, embed = model.connector, model.language.hidden_size
        assert isinstance(connector, PixelShuffleConfig)
        config = context.headless_config("connector", embed, connector.init_method_std)
        super().__init__(config=config)
        self.grid, self.factor = model.vision.grid, connector.factor
        width, init = width_of(model), config.init_method
        # The same on all tensor-parallel ranks, and so are its gradients: the layer behind it adds up theirs.
        self.norm = torch.nn.LayerNorm(width, eps=_EPSILON, dtype=context.dtype)
        self.linear_1 = column_linear(width, embed, config=config, init_method=init)
        self.linear_2 = row_linear(embed, embed, config=config, init_method=init)

    def forward(self, features_PNW: Tensor) -> Tensor:
        """Return [Q, N, E] image tokens of [P, N, W] patch features."""
        x = self.norm(squares_of(features_PNW, self.grid, self.factor))
        with get_fp8_context(self.config):  # nothing in bf16
            x = F.gelu(self.linear_1(x)[0])
            return self.linear_2(x)[0]


def build(model: ModelConfig, context: BuildContext) -> PixelShuffleConnector:
    """Build the connector (the function that every module of this folder has)."""
    return PixelShuffleConnector(model, context)
