"""Whether what is about to be saved is the model: every parameter, at its place, in its whole shape.

The shapes asked for are computed here from the parameters themselves and their tensor-parallel marks, and the places
from ranks and numbers of layers: not from what Megatron-Core's description says of them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.router import TopKRouter
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
            id(tensor): layer
            for layer in module.modules()
            if isinstance(layer, TransformerLayer)
            for _, tensor in _kept(layer)
        }
        experts = _experts(module)
        for name, tensor in _kept(module):
            if only is not None and name not in only:
                continue
            if id(tensor) not in by_tensor:
                yield f"{name}: would not be in the checkpoint"
            else:
                yield from _misplaced(by_tensor[id(tensor)], tensor, layers.get(id(tensor)), experts.get(id(tensor)))


def _kept(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what a checkpoint must have of a module: parameters, and the biases by which its routers choose experts."""
    yield from module.named_parameters()
    yield from expert_biases(module)


def expert_biases(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of the biases by which routers choose experts: fp32, and no parameters."""
    for prefix, router in module.named_modules():
        bias = getattr(router, "expert_bias", None) if isinstance(router, TopKRouter) else None
        if bias is not None:
            yield f"{prefix}.expert_bias".removeprefix("."), bias


def _experts(module: nn.Module) -> dict[int, tuple[int, int]]:
    """Return the number of the expert that each parameter is of, and how many the layer has, by the parameter's id."""
    found: dict[int, tuple[int, int]] = {}
    for one in module.modules():
        if isinstance(one, SequentialMLP):
            here = len(one.local_experts)
            first = mpu.get_expert_model_parallel_rank() * here
            for number, expert in enumerate(one.local_experts, start=first):
                place = number, here * mpu.get_expert_model_parallel_world_size()
                found |= {id(parameter): place for parameter in expert.parameters()}
    return found


def _misplaced(
    entry: Any, parameter: Tensor, layer: TransformerLayer | None, expert: tuple[int, int] | None
) -> Iterator[str]:
    cut = is_cut(parameter)
    axis = int(parameter.partition_dim) if cut else 0  # type: ignore[attr-defined]
    size, rank = _tensor_ranks(expert=expert is not None) if cut else (1, 0)
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
            yield from _wrong_axes(part, stacked, layer, expert)


def _tensor_ranks(*, expert: bool) -> tuple[int, int]:
    """Return how many ranks share a parameter that is cut, and which of them this is."""
    if expert:
        return mpu.get_expert_tensor_parallel_world_size(), mpu.get_expert_tensor_parallel_rank()
    return mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()


def _wrong_axes(
    part: Part, stacked: int, layer: TransformerLayer | None, expert: tuple[int, int] | None
) -> Iterator[str]:
    """Yield in which layer or expert of a stack a part would be, where that is another than its own.

    The axis of experts is the last; layers have one unless some have experts and some have not, whose keys have their
    numbers.
    """
    places = {} if expert is None else {stacked - 1: ("expert", expert)}
    if layer is not None and stacked > len(places):
        places[0] = "layer", (layer.layer_number - 1, layer.config.num_layers)
    for axis, (word, (number, count)) in places.items():
        there = (part.offset[axis], part.whole[axis]) if 0 <= axis < stacked else (0, 0)
        if there != (number, count):
            yield f"{part.key}: would be saved as {word} {there[0]} of {there[1]}, but is {number} of {count}"
    numbered = re.search(r"^language\.decoder\.layers\.(\d+)\.", part.key)
    if layer is not None and numbered and int(numbered[1]) != layer.layer_number - 1:
        yield f"{part.key}: would be saved under this key, but is of layer {layer.layer_number - 1}"


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
