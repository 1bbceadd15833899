"""Gradients for the distributed optimizer in fp32, without a search for each weight's place in each step.

Megatron-Core looks up for each weight which part of the buffers is this rank's, makes a view of the gradient there,
and after the update copies the weight back. Of fp32 weights the optimizer's shard is the weight's own memory, and
nothing is to be copied. With experts there are thousands of weights, and on a CPU this took 1 to 2 % of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


def keep_places(optimizer: MegatronOptimizer) -> None:
    """Have distributed optimizers all of whose weights are fp32 find their gradients once."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not isinstance(one, DistributedOptimizer) or one.is_stub_optimizer:
            continue
        places = _places(one)
        if places is not None:
            one._copy_model_grads_to_main_grads = partial(_take_gradients, places)
            one._copy_main_params_to_model_params = _nothing_to_copy


def _places(optimizer: Any) -> list[tuple[Any, Tensor]] | None:
    """Return each shard and the view of its gradient; None where one is not in fp32, or not the weight's own memory."""
    if optimizer.config.bf16 or optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
        return None
    found = []
    for weights, shards in zip(optimizer.model_fp32_groups, optimizer.shard_fp32_groups, strict=True):
        for weight, shard in zip(weights, shards, strict=True):
            places = optimizer._get_model_param_range_map(weight)
            here, (buffer, _, bucket) = places["gbuf_world_in_bucket"], optimizer.model_param_gbuf_map[weight]
            kept = optimizer.buffers[buffer].buckets[bucket].param_data.view(-1)[here.start : here.end]
            own = places["param"]
            if weight.main_grad.dtype != torch.float32 or kept.data_ptr() != shard.data_ptr():
                return None
            found.append((shard, weight.main_grad.view(-1)[own.start : own.end]))
    return found


def _take_gradients(places: Sequence[tuple[Any, Tensor]]) -> None:
    for shard, grad in places:
        shard.grad = grad


def _nothing_to_copy() -> None:
    """Weights in fp32 are updated where they lie."""
