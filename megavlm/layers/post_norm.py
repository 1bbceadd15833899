"""A norm behind attention and behind the MLP: what they give is normalised before it is added (GLM-4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

Sum = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


class NormedSum(torch.nn.Module):
    """Stands in a ``TransformerLayer`` where Megatron-Core has ``bias_dropout_add`` (``self_attn_bda``, ``mlp_bda``).

    Args:
        norm: class of the norm, which marks its weight for sequence parallelism.
        config: of the layer.
        eps: of the norm.
    """

    def __init__(self, norm: Any, config: TransformerConfig, eps: float) -> None:
        super().__init__()
        self.norm = norm(config=config, hidden_size=config.hidden_size, eps=eps)

    def forward(self, _training: bool, _fused: bool) -> Sum:
        """Return what the layer calls with the branch's output, the stream and the dropout probability."""
        return self._add

    def _add(self, x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        x, bias = x_with_bias
        assert not dropout, "norms behind branches are not built for dropout"
        normed: Tensor = self.norm(x if bias is None else x + bias)
        return residual + normed
