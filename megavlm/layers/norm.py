"""Norms in plain torch whose parameters carry the mark that sequence parallelism needs.

Megatron-Core all-reduces the gradients of parameters marked ``sequence_parallel`` over the tensor-parallel
ranks, each of which saw its part of the sequence. Without the mark training goes wrong silently.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    """RMSNorm times a weight on a CPU in fp32: what torch's operations give, bit for bit, in fewer passes.

    Autograd makes a tensor of each factor of each product; here two tensors are written over and over. As there, x has
    two gradients, of its product and of its square: where others use x too, sums are rounded in the same order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, same_x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[..., H] to [..., H]; ``weight`` is [H]."""
        scale = x.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed = x * scale
        ctx.save_for_backward(x, scale, weight, normed if ctx.needs_input_grad[2] else None)
        return normed * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Return the gradients of both x and of the weight."""
        x, scale, weight, normed = ctx.saved_tensors
        grad_product = grad_square = grad_weight = None
        rest = torch.empty_like(x)
        if normed is not None:
            torch.mul(grad, normed, out=rest)
            grad_weight = rest.sum(tuple(range(x.dim() - 1)))
        if ctx.needs_input_grad[0]:
            grad_product = grad * weight
            torch.mul(grad_product, x, out=rest)
            grad_mean = (-0.5 * rest.sum(-1, keepdim=True) * scale.pow(3)) / x.size(-1)
            grad_square = torch.mul(x, 2 * grad_mean, out=rest)
            grad_product.mul_(scale)
        return grad_product, grad_square, grad_weight, None


class TorchNorm(torch.nn.Module):
    """LayerNorm or RMSNorm over the last dimension, as ``config.normalization`` says.

    RMSNorm computes in fp32, casts back and then applies the weight, as Qwen does. On CUDA it is torch's one kernel,
    which applies the weight before it casts: the same in fp32, within a rounding in bf16.

    With ``config.layernorm_zero_centered_gamma`` the norm multiplies by 1 + weight, which starts at 0, and RMSNorm does
    so in fp32 before it casts, as Gemma does.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.rms = config.normalization == "RMSNorm"
        self.eps = eps
        self.zero_centered = bool(config.layernorm_zero_centered_gamma)
        start = torch.zeros if self.zero_centered else torch.ones
        self.weight = torch.nn.Parameter(start(hidden_size, dtype=config.params_dtype))
        self.bias = None if self.rms else torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., hidden_size]; dtype and shape stay."""
        if self.zero_centered:
            return self._zero_centered(x)
        if self.rms and x.is_cuda:
            return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)
        if self.rms and not torch.is_grad_enabled():  # the same operations; quicker for one token
            wide = x.float()
            return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight
        if self.rms and x.dtype == self.weight.dtype == torch.float32 and x.device.type == "cpu":
            found: Tensor = _RMSNorm.apply(x, x, self.weight, self.eps)
            return found
        if self.rms:
            return F.rms_norm(x.float(), (x.size(-1),), None, self.eps).to(x.dtype) * self.weight
        return F.layer_norm(x, (x.size(-1),), self.weight, self.bias, self.eps)

    def _zero_centered(self, x: Tensor) -> Tensor:
        scale = 1.0 + self.weight.float()
        if self.rms and x.dtype == self.weight.dtype == torch.float32 and x.device.type == "cpu":
            found: Tensor = _RMSNorm.apply(x, x, scale, self.eps)
            return found
        if self.rms:
            return F.rms_norm(x.float(), (x.size(-1),), scale, self.eps).to(x.dtype)
        assert self.bias is not None
        return F.layer_norm(x.float(), (x.size(-1),), scale, self.bias.float(), self.eps).to(x.dtype)
