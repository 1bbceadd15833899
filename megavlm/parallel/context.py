"""Context parallelism: which positions of a pack each of its ranks has, and how they get at those of the others.

Packs know nothing of it. Behind packing each segment is filled up to a multiple of 2 x CP positions and cut into 2 x CP
chunks, of which rank r has number r and number 2 x CP - 1 - r: with causal attention all ranks then have equally much
to do (the order that Transformer Engine's attention takes for granted). What fills up repeats the segment's last
position, behind it: nothing that is trained on sees it, it has no label, and no figure counts it.

Shape legend: S positions of the pack, L = CP x P positions of the pack filled up, of which each rank has P; N views,
Q features of a view, E width of the language model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from megavlm.parallel.device import has_kernels, local_device


@dataclass(frozen=True)
class ContextSplit:
    """How a pack is cut over the ranks of context parallelism; of one rank."""

    size: int
    """Ranks that share the pack (CP)."""
    rank: int
    """This one among them."""
    cu_seqlens: NDArray[np.int32]
    """[G + 1] where each segment of the filled-up pack starts, and L."""
    rows: NDArray[np.int64]
    """[P] the position in the pack that each of this rank's positions holds."""
    real: NDArray[np.bool_]
    """[P] whether it is that position, and not one that fills up."""
    plans: dict[Any, Any] = field(default_factory=dict, compare=False)
    """Where layers keep what they make of it once for all of them."""

    @property
    def lengths(self) -> list[int]:
        """Length of each segment of the filled-up pack."""
        return [int(length) for length in np.diff(self.cu_seqlens)]

    def chunks(self, length: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return begin and end, in a segment of so many positions, of this rank's two chunks."""
        width, mirror = length // (2 * self.size), 2 * self.size - 1 - self.rank
        return (self.rank * width, (self.rank + 1) * width), (mirror * width, (mirror + 1) * width)

    def order(self, device: torch.device) -> Tensor:
        """Return [L] where each position of the filled-up pack lies in what the ranks have, one behind the other."""
        return self._cached("order", device, self._order)

    def places(self, device: torch.device) -> Tensor:
        """Return [L] the inverse of :meth:`order`: the position of each row that the ranks have."""
        return self._cached("places", device, lambda: np.argsort(self._order()))

    def own_rows(self, device: torch.device) -> Tensor:
        """Return ``rows`` on a device."""
        return self._cached("rows", device, lambda: self.rows)

    def own_real(self, device: torch.device) -> Tensor:
        """Return ``real`` on a device."""
        return self._cached("real", device, lambda: self.real)

    def moved(self, position: int, cu_seqlens: ArrayLike) -> int:
        """Return where a position of the pack, whose segments start at ``cu_seqlens``, lies in the filled-up one."""
        starts = np.asarray(cu_seqlens)
        segment = int(np.searchsorted(starts, position, side="right")) - 1
        return int(self.cu_seqlens[segment]) + position - int(starts[segment])

    def _order(self) -> NDArray[np.int64]:
        positions, parts = len(self.rows), []
        for start, length in zip(self.cu_seqlens.tolist(), self.lengths, strict=False):
            width, local = length // (2 * self.size), start // self.size
            for chunk in range(2 * self.size):
                second = chunk >= self.size
                owner = 2 * self.size - 1 - chunk if second else chunk
                parts.append(owner * positions + local + second * width + np.arange(width, dtype=np.int64))
        return np.concatenate(parts)

    def _cached(self, name: str, device: torch.device, make: Any) -> Tensor:
        if (name, device) not in self.plans:
            self.plans[name, device] = torch.from_numpy(make()).to(device)
        found: Tensor = self.plans[name, device]
        return found


def common_length(length: int) -> int:
    """Return the length that a rank's packs are filled up to: its own, or the longest of all replicas.

    A collective where EP > 1 and several ranks share an expert: over gloo these gather each other's tokens, also those
    of other replicas, and what is gathered must be equally much from each (Megatron-Core's ``allgather`` dispatcher).
    With kernels it is ``alltoall``, which asks for no such thing.
    """
    sizes = mpu.get_expert_model_parallel_world_size(), mpu.get_expert_tensor_parallel_world_size()
    if has_kernels() or 1 in sizes:
        return length
    longest = torch.tensor([length], device=local_device())
    dist.all_reduce(longest, dist.ReduceOp.MAX, group=mpu.get_data_parallel_group())
    return int(longest)


def filled_length(cu_seqlens: NDArray[np.int32], size: int, unit: int = 1) -> int:
    """Return the least L of a pack: its segments filled up, and then to a multiple of ``unit`` on each rank.

    Args:
        cu_seqlens: [G + 1] of the pack.
        size: CP.
        unit: what must divide the positions of each rank: TP with sequence parallelism.
    """
    lengths, whole = np.diff(cu_seqlens), 2 * size
    used = int((-(-lengths // whole) * whole).sum())
    step = whole * unit
    return -(-used // step) * step


def split_context(cu_seqlens: NDArray[np.int32], size: int, rank: int, length: int) -> ContextSplit:
    """Cut a pack.

    Args:
        cu_seqlens: [G + 1] of the pack; no segment is empty.
        size: CP.
        rank: whose part is asked for.
        length: L, as :func:`filled_length` says or more of it; the last segment takes what is over.

    Raises:
        AssertionError: the pack does not fit ``length``, or 2 x CP does not divide it.
    """
    whole = 2 * size
    lengths = np.diff(cu_seqlens).astype(np.int64)
    assert lengths.min() > 0, f"a segment is empty: {cu_seqlens.tolist()}"
    filled = -(-lengths // whole) * whole
    rest = length - int(filled.sum())
    assert rest >= 0 and length % whole == 0, f"{filled.tolist()} do not fill {length} positions by {whole}"
    filled[-1] += rest
    bounds = np.concatenate([[0], np.cumsum(filled)]).astype(np.int32)
    rows, real = [], []
    for start, own, full in zip(cu_seqlens.tolist(), lengths.tolist(), filled.tolist(), strict=False):
        width = full // whole
        for chunk in (rank, whole - 1 - rank):
            at = np.arange(chunk * width, (chunk + 1) * width, dtype=np.int64)
            rows.append(start + np.minimum(at, own - 1))
            real.append(at < own)
    return ContextSplit(size, rank, bounds, np.concatenate(rows), np.concatenate(real))


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part_PX: Tensor, split: ContextSplit, group: Any) -> Tensor:
        ctx.split, ctx.group = split, group
        found_LX = part_PX.new_empty(part_PX.size(0) * split.size, *part_PX.shape[1:])
        dist.all_gather_into_tensor(found_LX, part_PX.contiguous(), group=group)
        return found_LX.index_select(0, split.order(part_PX.device))

    @staticmethod
    def backward(ctx: Any, grad_LX: Tensor) -> tuple[Tensor, None, None]:
        by_rank_LX = grad_LX.index_select(0, ctx.split.places(grad_LX.device))
        grad_PX = by_rank_LX.new_empty(by_rank_LX.size(0) // ctx.split.size, *by_rank_LX.shape[1:])
        dist.reduce_scatter_tensor(grad_PX, by_rank_LX, group=ctx.group)
        return grad_PX, None, None


def whole(part_PX: Tensor, split: ContextSplit) -> Tensor:
    """Return [L, ..] of all ranks, in the order of the filled-up pack, from this rank's [P, ..]; a collective.

    Gradients come home summed over the ranks.
    """
    found: Tensor = _Whole.apply(part_PX, split, mpu.get_context_parallel_group())
    return found
