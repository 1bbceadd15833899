"""Where a module's parameters lie in a checkpoint, through containers that Megatron-Core does not look into.

Megatron-Core asks a child for ``sharded_state_dict`` and takes one that has none (``torch.nn.Sequential``,
``ModuleList``, a wrapper of one's own) for a leaf whose parameters are the same on all tensor-parallel ranks. Of a
column-parallel layer inside, the first rank's part alone would be stored. Here such a container is given the method: it
asks its children, and goes by the tensor-parallel marks of parameters of its own.
"""

from __future__ import annotations

import functools
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch import nn

from megavlm.parallel.replicas import is_everywhere, is_on_all_stages, is_replica

_METHOD = "sharded_state_dict"


def sharded_state(module: nn.Module, prefix: str = "", metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return Megatron-Core's description of where every parameter of ``module`` lies, whatever contains it.

    Args:
        module: a model or a part of one.
        prefix: of the keys.
        metadata: Megatron-Core's, with ``dp_cp_group``.
    """
    for one in module.modules():
        if not hasattr(one, _METHOD):
            # On the instance: Megatron-Core's modules find it wherever they hold the container.
            setattr(one, _METHOD, functools.partial(_ask_children, one))
    state: dict[str, Any] = module.sharded_state_dict(prefix=prefix, metadata=metadata)  # type: ignore[operator]
    for entry in state.values():
        if is_everywhere(getattr(entry, "data", None)):
            entry.replica_id = (0, 0, dist.get_rank())
        elif is_replica(getattr(entry, "data", None)):  # built as if there were one rank: each would store it
            pipeline, _, data = entry.replica_id
            entry.replica_id = (pipeline, mpu.get_tensor_model_parallel_rank(), data)
        if is_on_all_stages(getattr(entry, "data", None)):
            pipeline, tensor, data = entry.replica_id
            stage = mpu.get_pipeline_model_parallel_rank()
            entry.replica_id = (pipeline, tensor, data + stage * mpu.get_data_parallel_world_size())
    return state


def _ask_children(
    container: nn.Module, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Describe a module that has no way of its own: its parameters by their marks, then its children."""
    assert metadata is not None
    group = getattr(container, "tp_group", None) or mpu.get_tensor_model_parallel_group()
    own: dict[str, Any] = {}
    container._save_to_state_dict(own, "", keep_vars=True)
    axes = {name: value.partition_dim for name, value in own.items() if is_cut(value)}
    state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
        own, prefix, axes, sharded_offsets, tp_group=group, dp_cp_group=metadata["dp_cp_group"]
    )
    for name, child in container.named_children():
        state.update(sharded_state_dict_default(child, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=group))
    return state


def is_cut(parameter: Any) -> bool:
    """Whether each tensor-parallel rank holds its own part of a parameter (Megatron-Core's mark)."""
    return bool(getattr(parameter, "tensor_model_parallel", False)) and getattr(parameter, "partition_dim", -1) >= 0
