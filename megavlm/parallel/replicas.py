"""Parts of a model that every tensor-parallel rank holds whole, each rank running them on its share of the pictures.

Megatron-Core cuts each layer over the tensor-parallel ranks. A part whose heads or widths these do not divide is
replicated instead: built as on one rank, from the same weights. Its ranks see different pictures, so that

* features are gathered over the ranks behind it (:class:`Shares`); what comes back is complete on every rank, since
  all that follows is tensor-parallel, and each rank takes the gradient of its own pictures;
* the gradient of its weights is a part of the whole on each rank, and summed once a step, where Megatron-Core sums
  those of norms under sequence parallelism (:func:`sum_gradients`);
* norms and checkpoints count its parameters once, as Megatron-Core's own norms: they carry no tensor-parallel mark.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from torch import Tensor, nn

from megavlm.config.split import picture_owners

_MARK = "tensor_parallel_replica"
_EVERYWHERE = "whole_on_all_ranks"
_STAGES = "on_all_stages"
_alone: tuple[Any, Any] | None = None
"""The job's group, and the group of this rank alone in that job."""
_column: tuple[Any, int, Any] | None = None
"""The job's group, its tensor-parallel size, and the group of the ranks of this one's index."""


def is_replica(tensor: Any) -> bool:
    """Whether a parameter is held whole by every tensor-parallel rank, each of which has a part of its gradient."""
    return bool(getattr(tensor, _MARK, False))


def is_everywhere(tensor: Any) -> bool:
    """Whether every rank of the job holds a parameter whole: of a tower that lies apart from the pipeline."""
    return bool(getattr(tensor, _EVERYWHERE, False))


@contextlib.contextmanager
def built_whole() -> Iterator[None]:
    """Have Megatron-Core's layers that are built inside take this rank for the only tensor-parallel one.

    They ask for their group when they are built and keep it; so no builder needs to know.
    """
    kept = mpu.get_tensor_model_parallel_group()
    mpu._TENSOR_MODEL_PARALLEL_GROUP = group_of_one()
    try:
        yield
    finally:
        mpu._TENSOR_MODEL_PARALLEL_GROUP = kept


@contextlib.contextmanager
def on_any_stage() -> Iterator[None]:
    """Have Megatron-Core's layers that are built inside take this rank for the only pipeline stage."""
    kept = mpu.get_pipeline_model_parallel_group()
    mpu._PIPELINE_MODEL_PARALLEL_GROUP = group_of_one()
    try:
        yield
    finally:
        mpu._PIPELINE_MODEL_PARALLEL_GROUP = kept


def group_of_one() -> Any:
    """Return the process group that this rank is in alone."""
    global _alone
    world = dist.group.WORLD
    if _alone is None or _alone[0] is not world:
        # Nothing is ever sent. NCCL would split the job's communicator, which asks all ranks to be here.
        _alone = world, dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)
    return _alone[1]


def group_of_column() -> Any:
    """Return the group of all ranks of the job with this one's tensor-parallel index; a collective over the job."""
    global _column
    world, tensor = dist.group.WORLD, mpu.get_tensor_model_parallel_world_size()
    if _column is None or _column[:2] != (world, tensor):
        size = dist.get_world_size()
        found = [dist.new_group(list(range(index, size, tensor))) for index in range(tensor)]
        _column = world, tensor, found[mpu.get_tensor_model_parallel_rank()]
    return _column[2]


def mark_replicas(module: nn.Module) -> None:
    """Mark the parameters of a part that was :func:`built_whole`."""
    for parameter in module.parameters():
        setattr(parameter, _MARK, True)
        if hasattr(parameter, "tensor_model_parallel"):  # else each rank's would be added to the gradient norm
            parameter.tensor_model_parallel = False
            parameter.partition_dim = -1  # type: ignore[attr-defined]


def mark_everywhere(module: nn.Module) -> None:
    """Mark the parameters of a part that every rank of the job holds whole: one of them saves it."""
    mark_replicas(module)
    for parameter in module.parameters():
        setattr(parameter, _EVERYWHERE, True)


def share_weights(module: nn.Module) -> None:
    """Give all tensor-parallel ranks the first one's replicas: on GPUs each draws its weights from its own stream."""
    group = mpu.get_tensor_model_parallel_group()
    for parameter in module.parameters():
        if is_replica(parameter) and group.size() > 1:
            dist.broadcast(parameter.data, mpu.get_tensor_model_parallel_src_rank(), group=group)


def is_on_all_stages(tensor: Any) -> bool:
    """Whether every stage holds a parameter, or the shard of one: of a tower that lies apart from the pipeline."""
    return bool(getattr(tensor, _STAGES, False))


def mark_on_all_stages(module: nn.Module) -> None:
    """Mark the parameters of a part that every stage holds: one of the stages saves it."""
    for parameter in module.parameters():
        setattr(parameter, _STAGES, True)


class Shares:
    """The pictures of a micro-batch, cut over the ranks of a group in runs that are as equal as can be.

    Args:
        count: pictures; at least one.
        group: the ranks; None for the tensor-parallel ones.
        summed: each rank goes on with a part of what is gathered, so that gradients are summed over them. Else all go
            on with all of it, and have the whole gradient.
    """

    def __init__(self, count: int, group: Any = None, *, summed: bool = False) -> None:
        self.group, self.summed = group or mpu.get_tensor_model_parallel_group(), summed
        rank, ranks = self.group.rank(), self.group.size()
        self.sizes = [count // ranks + int(i < count % ranks) for i in range(ranks)]
        self.start, self.own = sum(self.sizes[:rank]), self.sizes[rank]

    def of(self, pictures: Tensor) -> Tensor:
        """Return this rank's share of [N, ..]; one empty picture where that is none, so that all ranks do the same."""
        return pictures.narrow(0, self.start, self.own) if self.own else torch.zeros_like(pictures[:1])

    def take(self, features: Tensor) -> Tensor:
        """Return this rank's share of [P, N, W], which all ranks have, as :meth:`of` does; N is cut."""
        share = _Take.apply(features, self.sizes, self.group)
        return share if self.own else torch.cat([share, torch.zeros_like(features[:, :1])], dim=1)

    def gather(self, share: Tensor) -> Tensor:
        """Return [P, N, W] of all pictures from what became of each rank's share."""
        # What became of an empty picture goes no further; its gradient is zero, and not missing.
        return _Gather.apply(share[:, : self.own], self.sizes, self.group, self.summed)


class PackedShares:
    """The pictures of a micro-batch that have sizes of their own, cut over the ranks of a group between pictures.

    Args:
        counts: patches of each picture.
        group: the ranks; None for the tensor-parallel ones.
        summed: as of :class:`Shares`.
    """

    def __init__(self, counts: Sequence[int], group: Any = None, *, summed: bool = False) -> None:
        self.group, self.summed = group or mpu.get_tensor_model_parallel_group(), summed
        rank, ranks = self.group.rank(), self.group.size()
        self.first, self.owners = counts[0], picture_owners(counts, ranks)
        owners, self.sizes = self.owners, self._summed(counts)
        self.start, self.own = sum(self.sizes[:rank]), self.sizes[rank]
        self.pictures = [index for index, owner in enumerate(owners) if owner == rank]

    def of(self, patches_PF: Tensor, grid_V3: Tensor, tower: Any) -> tuple[Tensor, Tensor]:
        """Return this rank's share of the patches, and its grid; the tower's empty picture where that is none."""
        if self.own:
            return patches_PF.narrow(0, self.start, self.own), grid_V3[self.pictures]
        pixels, grid = tower.empty(patches_PF.device)
        return pixels.to(patches_PF.dtype), grid

    def take(self, features_P1W: Tensor) -> Tensor:
        """Return this rank's share of [P, 1, W], which all ranks have; some zeros where that is none."""
        share = _Take.apply(features_P1W.transpose(0, 1), self.sizes, self.group).transpose(0, 1)
        return share if self.own else torch.cat([share, torch.zeros_like(features_P1W[: self.first])])

    def grid_of(self, grid_V3: Tensor) -> Tensor:
        """Return the grid of what :meth:`take` returns: the zeros are as many as the first picture's patches."""
        return grid_V3[self.pictures] if self.own else grid_V3[:1]

    def gather(self, share: Tensor, rows: Sequence[int]) -> Tensor:
        """Return [Q, 1, W] of all pictures from what became of each rank's share.

        Args:
            share: [q, 1, W] of this rank.
            rows: what became of each picture, of all ranks.
        """
        sizes = self._summed(rows)
        own_1QW = share.transpose(0, 1)[:, : sizes[self.group.rank()]]
        return _Gather.apply(own_1QW, sizes, self.group, self.summed).transpose(0, 1)

    def _summed(self, numbers: Sequence[int]) -> list[int]:
        """Return the sum of each rank's pictures' numbers."""
        return [
            sum(number for number, owner in zip(numbers, self.owners, strict=True) if owner == rank)
            for rank in range(self.group.size())
        ]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, sizes: Sequence[int], group: Any, summed: bool) -> Tensor:
        ctx.sizes, ctx.group, ctx.summed = sizes, group, summed
        return _all_gather(share, sizes, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        work = _reduce_scatter if ctx.summed else _slice
        return work(grad, ctx.sizes, ctx.group), None, None, None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, sizes: Sequence[int], group: Any) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _slice(features, sizes, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(grad, ctx.sizes, ctx.group), None, None


def _slice(whole: Tensor, sizes: Sequence[int], group: Any) -> Tensor:
    return whole.narrow(1, sum(sizes[: group.rank()]), sizes[group.rank()]).contiguous()


def _all_gather(share: Tensor, sizes: Sequence[int], group: Any) -> Tensor:
    """[P, n, W] of each rank to [P, sum of sizes, W]."""
    most = max(sizes)
    sent_nPW = F.pad(share.transpose(0, 1).contiguous(), (0, 0, 0, 0, 0, most - share.size(1)))
    all_nPW = sent_nPW.new_empty(most * len(sizes), *sent_nPW.shape[1:])
    dist.all_gather_into_tensor(all_nPW, sent_nPW, group=group)
    if most * len(sizes) > sum(sizes):
        parts = [all_nPW[i * most : i * most + size] for i, size in enumerate(sizes)]
        all_nPW = torch.cat(parts)
    return all_nPW.transpose(0, 1).contiguous()


def _reduce_scatter(whole: Tensor, sizes: Sequence[int], group: Any) -> Tensor:
    """[P, sum of sizes, W] of each rank to the sum of this one's [P, n, W]."""
    most = max(sizes)
    parts = whole.transpose(0, 1).split(list(sizes))
    sent_nPW = torch.cat([F.pad(part, (0, 0, 0, 0, 0, most - part.size(0))) for part in parts])
    own_nPW = sent_nPW.new_empty(most, *sent_nPW.shape[1:])
    dist.reduce_scatter_tensor(own_nPW, sent_nPW, group=group)
    return own_nPW[: sizes[group.rank()]].transpose(0, 1).contiguous()


def sum_gradients(chunks: Sequence[Any]) -> None:
    """Add up over the tensor-parallel ranks what each has of its replicas' gradients, in place; once a step.

    After the reduction over data-parallel ranks: with the distributed optimizer, what lies outside this rank's share of
    a bucket is nobody's business, and stays.

    Args:
        chunks: this rank's model chunks, in Megatron-Core's DistributedDataParallel.
    """
    group = mpu.get_tensor_model_parallel_group()
    if group.size() == 1:
        return
    for chunk in chunks:
        done = {id(p) for name, p in chunk.named_parameters() if _summed_by_megatron(name, p, chunk.config)}
        wanted = {id(p) for p in chunk.parameters() if is_replica(p)} - done
        for buffer in chunk.buffers:
            for piece in _pieces(buffer, wanted, sharded=chunk.ddp_config.use_distributed_optimizer):
                dist.all_reduce(piece, group=group)


def _summed_by_megatron(name: str, parameter: Any, config: Any) -> bool:
    """Whether Megatron-Core's ``finalize_model_grads`` has done it already; it goes by marks, and by names."""
    if config.sequence_parallel and getattr(parameter, "sequence_parallel", False):
        return True
    return bool(config.qk_layernorm) and ("q_layernorm" in name or "k_layernorm" in name)


def _pieces(buffer: Any, wanted: set[int], *, sharded: bool) -> Iterator[Tensor]:
    """Yield the flat parts of a gradient buffer that hold wanted parameters, in as few parts as can be."""
    spans = sorted(
        (number, start, stop, id(parameter) in wanted)
        for parameter, (start, stop, number) in buffer.param_index_map.items()
    )
    for bucket_number, start, stop in _runs(spans):
        bucket = buffer.buckets[bucket_number]
        first, last = 0, bucket.grad_data.numel()
        if sharded:
            size = last // buffer.data_parallel_world_size
            first = buffer.data_parallel_group.rank() * size
            last = first + size
        first, last = max(first, start - bucket.offset), min(last, stop - bucket.offset)
        if first < last:
            yield bucket.grad_data[first:last]


def _runs(spans: Iterable[tuple[int, int, int, bool]]) -> list[tuple[int, int, int]]:
    """Join neighbours that are wanted to (bucket, start, stop); between them is padding at most."""
    runs: list[tuple[int, int, int]] = []
    before = False
    for number, start, stop, wanted in spans:
        if wanted and before and runs[-1][0] == number:
            runs[-1] = (number, runs[-1][1], stop)
        elif wanted:
            runs.append((number, start, stop))
        before = wanted
    return runs
