"""What a branch of a layer is multiplied by before it is added: a learned vector (arXiv 2103.17239), or a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.jit import jit_fuser
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

Sum = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


@jit_fuser
def _scaled_sum(x: Tensor, bias: Tensor, residual: Tensor, scale: Tensor) -> Tensor:
    return residual + scale * (x + bias)


class LayerScale(torch.nn.Module):
    """Stands in a ``TransformerLayer`` where Megatron-Core has ``bias_dropout_add`` (``self_attn_bda``, ``mlp_bda``).

    Every tensor-parallel rank has the whole vector and sees whole sums, so its gradient is the same on all.

    Args:
        hidden_size: width of the stream.
        init: initial value.
        dtype: of the vector.
    """

    def __init__(self, hidden_size: int, init: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((hidden_size,), init, dtype=dtype))

    def forward(self, _training: bool, _fused: bool) -> Sum:
        """Return what the layer calls with the branch's output, the stream and the dropout probability."""
        return self._add

    def _add(self, x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        x, bias = x_with_bias
        assert not dropout, "layer scale is not built for dropout"
        if bias is None:
            return residual + self.weight * x
        result: Tensor = _scaled_sum(x, bias, residual, self.weight)
        return result


@jit_fuser
def _multiplied_sum(x: Tensor, bias: Tensor, residual: Tensor, multiplier: float) -> Tensor:
    return residual + multiplier * (x + bias)


class ResidualMultiplier(torch.nn.Module):
    """Stands where :class:`LayerScale` may stand: a branch is multiplied by a fixed number (MiniCPM, Granite).

    Args:
        multiplier: the number.
    """

    def __init__(self, multiplier: float) -> None:
        super().__init__()
        self.multiplier = multiplier

    def forward(self, _training: bool, _fused: bool) -> Sum:
        """Return what the layer calls with the branch's output, the stream and the dropout probability."""
        return self._add

    def _add(self, x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        x, bias = x_with_bias
        assert not dropout, "a multiplied branch is not built for dropout"
        if bias is None:
            return torch.add(residual, x, alpha=self.multiplier)
        result: Tensor = _multiplied_sum(x, bias, residual, self.multiplier)
        return result


class NormedSum(torch.nn.Module):
    """Stands where :class:`LayerScale` may stand: a branch is normalised before it is added (Gemma 3, GLM-4).

    Args:
        norm: kind of the norm.
        config: of the layer.
        multiplier: what the norm gives is multiplied by it.
    """

    def __init__(self, norm: Any, config: Any, multiplier: float = 1.0) -> None:
        super().__init__()
        self.norm = build_module(norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self.multiplier = multiplier

    def forward(self, _training: bool, _fused: bool) -> Sum:
        """Return what the layer calls with the branch's output, the stream and the dropout probability."""
        return self._add

    def _add(self, x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        x, bias = x_with_bias
        assert not dropout, "a normalised branch is not built for dropout"
        # Megatron-Core calls this with gradients on, whoever switched them off outside: answers need no graph, also
        # behind a stage, whose output Megatron-Core receives as a tensor that requires gradients.
        learns = self.training or x.requires_grad or residual.requires_grad
        learns = learns and not torch.is_inference_mode_enabled()
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            return torch.add(residual, self.norm(x if bias is None else x + bias), alpha=self.multiplier)


class GatedSum(torch.nn.Module):
    """Stands where :class:`LayerScale` may stand: a branch is multiplied by tanh of a learned number (Mllama).

    Every tensor-parallel rank has the number; with sequence parallelism each sees its own positions, and Megatron-Core
    sums the gradients.

    Args:
        config: of the layer.
        init: initial value; 0 lets nothing through.
    """

    def __init__(self, config: Any, init: float = 0.0) -> None:
        super().__init__()
        self.gate = torch.nn.Parameter(torch.full((1,), init, dtype=config.params_dtype))
        self.gate.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, _training: bool, _fused: bool) -> Sum:
        """Return what the layer calls with the branch's output, the stream and the dropout probability."""
        return self._add

    def _add(self, x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        x, bias = x_with_bias
        assert not dropout, "a gated branch is not built for dropout"
        return residual + self.gate.tanh() * (x if bias is None else x + bias)
