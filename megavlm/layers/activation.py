"""Activations in plain torch, plugged into Megatron-Core's MLP by spec: the language model's gated one, a tower's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu
from megatron.core.jit import jit_fuser
from megatron.core.transformer.mlp import MLP
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


class _GeGLU(torch.autograd.Function):
    """``gelu(gate) * up``, which keeps its input alone, as :class:`_SwiGLU` does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: str) -> Tensor:
        """[..., 2 * F] to [..., F]: the first half is the gate."""
        ctx.save_for_backward(x)
        ctx.approximate = approximate
        gate, up = x.chunk(2, dim=-1)
        return F.gelu(gate, approximate=approximate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the input."""
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)
        rest = F.gelu(gate, approximate=ctx.approximate)
        torch.mul(grad, rest, out=grad_up)
        torch.mul(grad, up, out=rest)
        torch.ops.aten.gelu_backward.grad_input(rest, gate, approximate=ctx.approximate, grad_input=grad_gate)
        return grad_x, None


@jit_fuser
def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


@jit_fuser
def _bias_gelu_tanh(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias, approximate="tanh")


@jit_fuser
def _bias_quick_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return quick_gelu(x + bias)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh form (``F.gelu(x, approximate="tanh")``), as a function that can be told from the exact one."""
    return F.gelu(x, approximate="tanh")


# Bias and activation as one kernel where functions are compiled. Megatron-Core's own fused bias-GELU is the tanh form.
_WITH_BIAS: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    F.gelu: _bias_gelu,
    gelu_tanh: _bias_gelu_tanh,
    quick_gelu: _bias_quick_gelu,
}


class BiasActivationMLP(MLP):
    """Megatron-Core's MLP without a gate, with bias and activation in one function.

    A built MLP is turned into one: Megatron-Core's layer knows MLPs by their exact class when it builds them.
    """

    @classmethod
    def take_over(cls, mlp: MLP) -> None:
        """Turn ``mlp`` into one of these, with its layers."""
        assert type(mlp) is MLP, type(mlp)
        mlp.__class__ = cls

    def forward(self, hidden_states: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Return [..., hidden_size] and the bias to add to it."""
        fused = _WITH_BIAS.get(self.activation_func)
        if fused is None or self.config.gated_linear_unit:
            return super().forward(hidden_states, *rest, **options)
        x, bias = self.linear_fc1(hidden_states)
        x = self.activation_func(x) if bias is None else fused(x, bias)
        return self.linear_fc2(x)


class GeGLUMLP(MLP):
    """Megatron-Core's MLP with a gate by GELU, exact or tanh (Gemma).

    Megatron-Core's own keeps gate, its activation and up apart, or, fused, knows the tanh form alone and calls it GELU.
    A built MLP is turned into one, as into :class:`BiasActivationMLP`.
    """

    approximate: str

    @classmethod
    def take_over(cls, mlp: MLP) -> None:
        """Turn ``mlp``, whose activation is ``F.gelu`` or :func:`gelu_tanh`, into one of these."""
        assert type(mlp) is MLP and mlp.config.gated_linear_unit, type(mlp)
        forms = {F.gelu: "none", gelu_tanh: "tanh"}
        mlp.approximate = forms[mlp.activation_func]
        mlp.__class__ = cls

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        """Return [..., hidden_size] and the bias to add to it."""
        x, bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(_GeGLU.apply(x if bias is None else x + bias, self.approximate))
