"""What experts cost on a CPU beside their products: an expert's tokens are one slice, and nothing is copied in vain.

Megatron-Core's experts (``SequentialMLP``) are modules called one after the other, whose tokens are split, whose
results are joined, and whose weights' gradients are made apart and then added to the gradient buffer; its dispatcher
sorts chunks of tokens that are in order already, and adds up tokens' copies number by number. Kernels for GPUs (grouped
products, Transformer Engine's permutations) leave nothing of that; a CPU spends much of a layer's time on it. What is
here stands in for both on CPUs alone, and computes the same.

Shape legend: N tokens, M copies of tokens, one for each expert that takes it, in the order of the experts; X experts, H
width of the model, F of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 512
"""Rows of neighbouring experts that are activated together: few calls, and they stay in a core's cache."""


def _blocks(sizes: list[int]) -> list[tuple[list[int], slice]]:
    """Return neighbouring experts, those without tokens left out, and their rows."""
    found: list[tuple[list[int], slice]] = []
    experts: list[int] = []
    begin = end = 0
    for number, size in enumerate(sizes):
        if not size:
            continue
        experts.append(number)
        end += size
        if end - begin >= BLOCK:
            found.append((experts, slice(begin, end)))
            experts, begin = [], end
    return [*found, (experts, slice(begin, end))] if experts else found


class _Products(torch.autograd.Function):
    """Gated MLPs by SiLU, each on its slice; keeps inputs and what the first products give."""

    @staticmethod
    def forward(ctx: Any, x_MH: Tensor, probs_M1: Tensor, sizes: list[int], *weights: Tensor) -> Tensor:
        count = len(sizes)
        both = x_MH.new_empty(x_MH.size(0), weights[0].size(0))  # [M, 2 F]
        out_MH = torch.empty_like(x_MH)
        gate_MF, up_MF = both.chunk(2, dim=-1)
        for experts, rows in _blocks(sizes):
            parts = [sizes[number] for number in experts]
            for number, x, here in zip(
                experts, x_MH[rows].split_with_sizes(parts), both[rows].split_with_sizes(parts), strict=True
            ):
                torch.mm(x, weights[number].t(), out=here)
            inner = F.silu(gate_MF[rows]).mul_(up_MF[rows]).mul_(probs_M1[rows])
            for number, x, out in zip(
                experts, inner.split_with_sizes(parts), out_MH[rows].split_with_sizes(parts), strict=True
            ):
                torch.mm(x, weights[count + number].t(), out=out)
        trains = any(ctx.needs_input_grad[3:])  # else inputs are not needed any more
        ctx.save_for_backward(x_MH if trains else None, probs_M1, both, *weights)
        ctx.sizes = sizes
        return out_MH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_MH: Tensor) -> tuple[Tensor | None, ...]:
        x_MH, probs_M1, both, *weights = ctx.saved_tensors
        sizes, count, grad_MH = ctx.sizes, len(ctx.sizes), grad_MH.contiguous()
        needs_x, needs_probs, _, *needs = ctx.needs_input_grad
        grad_x_MH = torch.empty_like(grad_MH) if needs_x else None
        grad_probs_M1 = torch.empty_like(probs_M1) if needs_probs else None
        grads = [_nothing(one) if wanted and not sizes[number % count] else None
                 for number, (one, wanted) in enumerate(zip(weights, needs, strict=True))]  # fmt: skip
        gate_MF, up_MF = both.chunk(2, dim=-1)
        for experts, rows in _blocks(sizes):
            parts, gate, up, probs = [sizes[number] for number in experts], gate_MF[rows], up_MF[rows], probs_M1[rows]
            grad_out = grad_MH[rows].split_with_sizes(parts)
            grad_inner = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
            for number, grad, here in zip(experts, grad_out, grad_inner.split_with_sizes(parts), strict=True):
                torch.mm(grad, weights[count + number], out=here)
            gated = F.silu(gate)
            inner = gated * up
            if grad_probs_M1 is not None:
                torch.sum(grad_inner.float() * inner.float(), -1, keepdim=True, out=grad_probs_M1[rows])
            grad_inner.mul_(probs)
            inner.mul_(probs)
            grad_both = torch.empty_like(both[rows])
            grad_gate, grad_up = grad_both.chunk(2, dim=-1)
            torch.mul(grad_inner, gated, out=grad_up)
            torch.mul(grad_inner, up, out=gated)
            torch.ops.aten.silu_backward.grad_input(gated, gate, grad_input=grad_gate)
            for number, grad, x in zip(experts, grad_out, inner.split_with_sizes(parts), strict=True):
                if needs[count + number]:
                    grads[count + number] = weight_gradient(weights[count + number], grad, x)
            inputs = grad_both.split_with_sizes(parts) if x_MH is None else x_MH[rows].split_with_sizes(parts)
            outs = inputs if grad_x_MH is None else grad_x_MH[rows].split_with_sizes(parts)
            for number, grad, x, out in zip(experts, grad_both.split_with_sizes(parts), inputs, outs, strict=True):
                if needs[number]:
                    grads[number] = weight_gradient(weights[number], grad, x)
                if grad_x_MH is not None:
                    torch.mm(grad, weights[number], out=out)
        return grad_x_MH, grad_probs_M1, None, *grads


def weight_gradient(weight: Any, grad: Tensor, inputs: Tensor) -> Tensor | None:
    """Return the gradient of a weight for autograd; where there is a buffer for it, add it there and return None.

    Args:
        weight: [out, in].
        grad: [T, out] gradient of what the product gave.
        inputs: [T, in].
    """
    if not has_buffer(weight):
        return grad.t() @ inputs
    if is_stale(weight):
        torch.mm(grad.t(), inputs, out=weight.main_grad)
    else:
        torch.addmm(weight.main_grad, grad.t(), inputs, out=weight.main_grad)
    _say_it_is_there(weight)
    return None


def _nothing(weight: Any) -> Tensor | None:
    """Return the gradient of a weight that no token met: zeros, or None where they are in the buffer."""
    if not has_buffer(weight):
        return torch.zeros_like(weight)
    if is_stale(weight):
        weight.main_grad.zero_()
    _say_it_is_there(weight)
    return None


def has_buffer(weight: Any) -> bool:
    """Whether gradients of a weight are put into Megatron-Core's gradient buffer here."""
    buffer = getattr(weight, "main_grad", None)
    return buffer is not None and buffer.dtype == weight.dtype and hasattr(weight, "grad_added_to_main_grad")


def is_stale(weight: Any) -> bool:
    """Whether the buffer's part of a weight was left as it is where others were zeroed: for what comes first."""
    return getattr(weight, "main_grad_is_stale", False)


def _say_it_is_there(weight: Any) -> None:
    """Say that the buffer holds a weight's gradient, to Megatron-Core's DistributedDataParallel.

    Its hook runs where autograd brings a weight no gradient too. It takes those whose gradient is in the buffer by
    ``grad_added_to_main_grad``, looks only whether ``grad`` is there, and takes it away: no memory is needed for it.
    """
    weight.main_grad_is_stale = False
    weight.grad_added_to_main_grad = True
    weight.grad = weight.main_grad


def products(x_MH: Tensor, probs_M: Tensor, sizes: Sequence[int], first: list[Tensor], second: list[Tensor]) -> Tensor:
    """Return [M, H] of gated MLPs by SiLU, times the weight of each copy.

    Args:
        x_MH: the experts' tokens, one expert's behind the other's.
        probs_M: weight of each.
        sizes: tokens of each expert.
        first: [2 F, H] of each expert, gate first.
        second: [H, F] of each.
    """
    found: Tensor = _Products.apply(x_MH, probs_M[:, None], list(sizes), *first, *second)
    return found


def _places(tokens_M: Any, count: int) -> tuple[Tensor, Tensor]:
    """Return [M] where the copies of each token lie, token by token, and [N] where each token's begin there.

    They are found once for a layer: the tensor of tokens' numbers, which nobody writes into, keeps them.
    """
    if getattr(tokens_M, "places", None) is None:
        copies_N = torch.bincount(tokens_M, minlength=count)
        tokens_M.places = tokens_M.argsort(stable=True), copies_N.cumsum(0) - copies_N
    found: tuple[Tensor, Tensor] = tokens_M.places
    return found


def _added(copies_MH: Tensor, tokens_M: Tensor, count: int) -> Tensor:
    """Return [N, H]: the sum of each token's copies."""
    places, starts = _places(tokens_M, count)
    found: Tensor = torch._embedding_bag_forward_only(copies_MH, places, starts)[0]  # sums; a kernel for rows
    return found


class _Copies(torch.autograd.Function):
    """[M, H] copies of tokens; gradients are added up."""

    @staticmethod
    def forward(ctx: Any, tokens_NH: Tensor, tokens_M: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_M)
        ctx.count = tokens_NH.size(0)
        return tokens_NH.index_select(0, tokens_M)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_MH: Tensor) -> tuple[Tensor, None]:
        return _added(grad_MH.contiguous(), ctx.saved_tensors[0], ctx.count), None


class _Sum(torch.autograd.Function):
    """[N, H] sum of each token's copies."""

    @staticmethod
    def forward(ctx: Any, copies_MH: Tensor, tokens_M: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(tokens_M)
        return _added(copies_MH, tokens_M, count)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor, None, None]:
        return grad_NH.index_select(0, ctx.saved_tensors[0]), None, None


def copies(tokens_NH: Tensor, tokens_M: Tensor) -> Tensor:
    """Return [M, H]: the copies of tokens whose numbers are ``tokens_M``."""
    found: Tensor = _Copies.apply(tokens_NH, tokens_M)
    return found


def summed(copies_MH: Tensor, tokens_M: Tensor, count: int) -> Tensor:
    """Return [N, H], N = ``count``: of each token the sum of its copies, whose tokens are ``tokens_M``; 0 without."""
    found: Tensor = _Sum.apply(copies_MH, tokens_M, count)
    return found
