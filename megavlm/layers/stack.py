"""Linear layers one behind the other, with an activation between them, cut over the tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavlm.layers.linear import column_linear, row_linear


def linear_stack(widths: Sequence[int], config: TransformerConfig, *, bias: bool = True) -> nn.ModuleList:
    """Build layers from each width to the next one.

    They alternate between column-parallel and row-parallel; with an odd number of them the last one's output is
    gathered.

    Args:
        widths: of the input, and of what each layer gives.
        config: number type, tensor-parallel size and initial weights.
        bias: whether each has one.
    """
    layers: list[nn.Module] = []
    last = len(widths) - 2
    for i, (size_in, size_out) in enumerate(pairwise(widths)):
        init = config.init_method
        if i % 2 == 0:
            gather = i == last
            layers.append(
                column_linear(size_in, size_out, config=config, init_method=init, bias=bias, gather_output=gather)
            )
        else:
            layers.append(row_linear(size_in, size_out, config=config, init_method=init, bias=bias))
    return nn.ModuleList(layers)


def run_stack(layers: nn.ModuleList, x: Tensor, activation: Callable[[Tensor], Tensor] = F.gelu) -> Tensor:
    """Return what the layers make of ``x`` [.., first width]: [.., last width], with the activation between them."""
    for i, layer in enumerate(layers):
        x = layer(x if i == 0 else activation(x))[0]
    return x
