"""Whether what is about to be saved is the model: every parameter, at its place, in its whole shape.

The shapes asked for are computed here from the parameters themselves and their tensor-parallel marks, and the places
from ranks and numbers of layers: not from what Megatron-Core's description says of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megavlm.checkpoint.containers import is_cut


@dataclass(frozen=True)
class Part:
    """A parameter of this rank, or a part of it, as a checkpoint has it.

    Attributes:
        key: of the tensor in the checkpoint.
        offset: where the part begins in that tensor.
        shape: of the part, without the axis of layers.
        whole: shape of that tensor.
        start: where the part begins in the flattened parameter, or None where its numbers are not in one piece.
    """

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    start: int | None

    @property
    def place(self) -> tuple[str, tuple[int, ...]]:
        """What no two parts have in common."""
        return self.key, self.offset


def parts(entry: Any) -> list[Part]:
    """Return the parts that a sharded tensor, or a factory of some (gate and up of an MLP), makes of a parameter."""
    if isinstance(entry, ShardedTensor):
        return [Part(entry.key, tuple(entry.global_offset), tuple(entry.local_shape), tuple(entry.global_shape), 0)]
    # Of shapes alone: FP8 weights cannot be cut.
    like = torch.empty(entry.data.shape, dtype=entry.data.dtype, device="meta")
    found = []
    for one in nested_values(dataclasses.replace(entry, data=like).build()):
        a_view = one.data.untyped_storage()._cdata == like.untyped_storage()._cdata
        start = int(one.data.storage_offset()) if a_view and one.data.is_contiguous() else None
        found.append(Part(one.key, tuple(one.global_offset), tuple(one.local_shape), tuple(one.global_shape), start))
    return found


def misplaced(modules: Sequence[nn.Module], state: dict[str, Any], only: set[str] | None = None) -> Iterator[str]:
    """Yield what is wrong with the description of this rank's chunks, naming the tensor.

    Args:
        modules: the bare chunks.
        state: :func:`megavlm.checkpoint.slots.model_state` of them.
        only: names of the parameters that are to be there; None for all.
    """
    for i, module in enumerate(modules):
        entries = state["model" if len(modules) == 1 else f"model{i}"].values()
        by_tensor = {id(entry.data): entry for entry in entries}
        layers = {
            id(parameter): layer
            for layer in module.modules()
            if isinstance(layer, TransformerLayer)
            for parameter in layer.parameters()
        }
        for name, parameter in module.named_parameters():
            if only is not None and name not in only:
                continue
            if id(parameter) not in by_tensor:
                yield f"{name}: would not be in the checkpoint"
            elif getattr(parameter, "allreduce", True):  # experts are placed by groups of their own
                yield from _misplaced(by_tensor[id(parameter)], parameter, layers.get(id(parameter)))


def _misplaced(entry: Any, parameter: Tensor, layer: TransformerLayer | None) -> Iterator[str]:
    cut = is_cut(parameter)
    axis = int(parameter.partition_dim) if cut else 0  # type: ignore[attr-defined]
    size = mpu.get_tensor_model_parallel_world_size() if cut else 1
    rank = mpu.get_tensor_model_parallel_rank() if cut else 0
    own = parts(entry)
    if sum(_count(part.shape) for part in own) != parameter.numel():
        yield f"{entry.key}: its parts do not make the parameter of shape {list(parameter.shape)}"
    for key in dict.fromkeys(part.key for part in own):
        same = [part for part in own if part.key == key]
        for i, part in enumerate(same):
            stacked = len(part.whole) - len(part.shape)
            wanted, offset = list(part.shape), [0] * len(part.shape)
            if part.shape:
                wanted[axis] = size * sum(one.shape[axis] for one in same)
                offset[axis] = (i * size + rank) * part.shape[axis]
            if list(part.whole[stacked:]) != wanted:
                yield (
                    f"{key}: has the shape {list(part.whole)} in the checkpoint, but the model's is {wanted}"
                    + (f" (rank {rank} of {size} tensor-parallel ranks holds {list(parameter.shape)})" if cut else "")
                )
            elif len({one.shape for one in same}) == 1 and list(part.offset[stacked:]) != offset:
                yield f"{key}: a part begins at {list(part.offset)} instead of {offset}"
            if stacked and layer is not None:
                place = (layer.layer_number - 1, layer.config.num_layers)
                if (part.offset[0], part.whole[0]) != place:
                    found = f"layer {part.offset[0]} of {part.whole[0]}"
                    yield f"{key}: would be saved as {found}, but is {place[0]} of {place[1]}"


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
