"""Gradient buffers at the begin of a step: what is written first is not zeroed before.

Megatron-Core zeroes its buffers, and adds each gradient to what is there. Experts are most of a model's weights, and
each weight meets few tokens: on a CPU zeroing costs them as much as clipping or scaling does. Where experts compute
their own weights' gradients (``layers/expert_products.py``) the first of a step is written, and their part of the
buffer keeps the last step's numbers until then.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from megavlm.layers.expert_products import is_stale
from megavlm.layers.experts import Experts


def leave_to_experts(chunk: Any) -> None:
    """Have the buffers of a wrapped chunk (Megatron-Core's DistributedDataParallel) leave out experts' weights."""
    weights = [weight for one in chunk.modules() if isinstance(one, Experts) for weight in one.written_weights()]
    for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
        own = [weight for weight in weights if weight in buffer.param_index_map]
        if own:
            buffer.reset = partial(_reset, _others(buffer, own), own)


def zero_stale(chunk: Any) -> None:
    """Zero what no backward pass of this step has written."""
    for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
        for weight in buffer.params:
            if is_stale(weight):
                weight.main_grad.zero_()
                weight.main_grad_is_stale = False


def _reset(others: Sequence[Tensor], weights: Sequence[Any]) -> None:
    for part in others:
        part.zero_()
    for weight in weights:
        weight.main_grad_is_stale = True


def _others(buffer: Any, weights: Sequence[Any]) -> list[Tensor]:
    """Return views of a buffer that are all of it but the gradients of ``weights``."""
    found, begin = [], 0
    for first, end in sorted(buffer.param_index_map[weight][:2] for weight in weights):
        if first > begin:
            found.append(buffer.grad_data[begin:first])
        begin = end
    return [*found, buffer.grad_data[begin:]]
