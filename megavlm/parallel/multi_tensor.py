"""Norms and scaling of many tensors without Transformer Engine or Apex, and without a wait for each of them.

Megatron-Core's own stand-ins take the norm of each tensor to the host. These have the same interface (that of Apex's
``amp_C``) over ``torch._foreach_*``, which torch's ``clip_grad_norm_`` uses too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def l2_norm(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool) -> Any:
    """Return ([1] fp32 norm of all tensors of ``tensor_lists[0]``, on their device, and None)."""
    assert not per_tensor, "Megatron-Core asks for the norm of all tensors"
    norms = torch._foreach_norm(tensor_lists[0])
    return torch.linalg.vector_norm(torch.stack(norms)).float().view(1), None


def scale(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], factor: float) -> None:
    """Write ``tensor_lists[0]`` times ``factor`` into ``tensor_lists[1]``; both may be the same tensors."""
    source, target = tensor_lists
    if any(a is not b for a, b in zip(source, target, strict=True)):
        torch._foreach_copy_(target, source)
    torch._foreach_mul_(target, factor)


def install() -> None:
    """Let Megatron-Core use them where it found neither Transformer Engine nor Apex."""
    from megatron.core.optimizer import clip_grads, optimizer  # noqa: PLC0415 - not before prepare_device
    from megatron.core.utils import (  # noqa: PLC0415
        local_multi_tensor_l2_norm,
        local_multi_tensor_scale,
    )

    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = l2_norm
    for module in (clip_grads, optimizer):
        if module.multi_tensor_scale_impl is local_multi_tensor_scale:
            module.multi_tensor_scale_impl = scale
