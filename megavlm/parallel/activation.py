"""The gated activation of the language model in plain torch, plugged into Megatron-Core's MLP by spec."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _SwiGLU(torch.autograd.Function):
    """``silu(gate) * up``, whose gradient is written into one tensor and which keeps its input alone.

    Autograd's own version keeps three tensors and joins two gradients with a copy of both: on a CPU that
    costs as much as a tenth of the layer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """[..., 2 * F] to [..., F]: the first half is the gate."""
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Return the gradient of the input."""
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)
        rest = F.silu(gate)
        torch.mul(grad, rest, out=grad_up)
        torch.mul(grad, up, out=rest)
        torch.ops.aten.silu_backward.grad_input(rest, gate, grad_input=grad_gate)
        return grad_x


def swiglu(x: Tensor) -> Tensor:
    """Return ``silu(gate) * up`` of [..., 2 * F], gate first; [..., F]."""
    if not torch.is_grad_enabled():  # half the time for one token
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
    return _SwiGLU.apply(x)
