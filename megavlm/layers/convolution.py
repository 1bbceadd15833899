"""What connectors convolve with: features of patches as a map, depthwise convolutions, pooling, gates of channels.

Depthwise convolutions and norms are the same on all tensor-parallel ranks, and so are their gradients: the parallel
layers around them give and take whole channels. A 1 x 1 convolution is a linear layer, and cut as one.

Shape legend: N images, P patches of an image row by row, Q patches of what is made of it, C channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavlm.layers.linear import column_linear, row_linear


def depthwise(channels: int, config: TransformerConfig, *, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """Return a 3 x 3 convolution of each channel by itself, with zeros around the map."""
    return nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=bias, dtype=config.params_dtype)


def convolve(convolution: Callable[[Tensor], Tensor], x_NPC: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return [N, Q, C] of a convolution, or another operation on maps [N, C, rows, columns].

    Args:
        convolution: what is done.
        x_NPC: row by row of ``grid``.
        grid: rows and columns of patches.
    """
    # Both views have the channels last in memory, as convolutions and the layers around them like it.
    y = convolution(x_NPC.transpose(1, 2).unflatten(2, grid))
    return y.flatten(2).transpose(1, 2)


def pool(x_NPC: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Return [N, side * side, C]: means over parts of the map, which overlap where ``side`` does not divide it."""
    y = F.adaptive_avg_pool2d(x_NPC.transpose(1, 2).unflatten(2, grid), (side, side))
    return y.flatten(2).transpose(1, 2).contiguous()


class ChannelGate(MegatronModule):
    """Squeeze and excitation (arXiv 1709.01507): each channel times a number that the map's means say.

    Args:
        channels: C.
        squeezed: width between its two layers; the tensor-parallel ranks share it.
        config: number type, tensor-parallel size and initial weights.
        activation: between the layers.
        gate: behind them.
    """

    def __init__(
        self,
        channels: int,
        squeezed: int,
        config: TransformerConfig,
        activation: Callable[[Tensor], Tensor],
        gate: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(config=config)
        self.squeeze = column_linear(channels, squeezed, config=config, init_method=config.init_method)
        self.expand = row_linear(squeezed, channels, config=config, init_method=config.init_method)
        self._activation, self._gate = activation, gate

    def forward(self, x_NPC: Tensor) -> Tensor:
        """Return [N, P, C]."""
        means_NC = x_NPC.mean(1)
        scale_NC = self._gate(self.expand(self._activation(self.squeeze(means_NC)[0]))[0])
        return x_NPC * scale_NC.unsqueeze(1)


def pointwise(size_in: int, size_out: int, config: TransformerConfig) -> nn.Module:
    """Return a 1 x 1 convolution without bias, whose output is gathered."""
    layer: nn.Module = column_linear(
        size_in, size_out, config=config, init_method=config.init_method, bias=False, gather_output=True
    )
    return layer


def channel_norm(channels: int, config: TransformerConfig, epsilon: float) -> nn.LayerNorm:
    """Return a LayerNorm over the channels of each patch."""
    return nn.LayerNorm(channels, eps=epsilon, dtype=config.params_dtype)


def swapped(x: Tensor) -> Tensor:
    """[P, N, C], as towers and connectors give features, to [N, P, C], and back."""
    return x.transpose(0, 1).contiguous()
