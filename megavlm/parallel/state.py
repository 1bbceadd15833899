"""Process groups: joining the job, Megatron-Core's parallel state, and leaving again."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel

from megavlm.config.errors import FAILED, WRONG_INPUT, OtherRankError, for_users, set_speaker
from megavlm.config.schema import ParallelConfig
from megavlm.parallel import adam, multi_tensor, wgrad
from megavlm.parallel.device import backend, has_cuda, local_device
from megavlm.parallel.rendezvous import fresh_store

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def process_groups(parallel: ParallelConfig, seed: int) -> Iterator[None]:
    """Join the job that ``torchrun`` describes (or run alone) and build Megatron-Core's groups.

    Args:
        parallel: the layout.
        seed: seed of weights and dropout; tensor- and pipeline-parallel ranks get their own streams from it.
    """
    if has_cuda():
        torch.cuda.set_device(local_device())
    timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
    store, rank, world_size = dist.HashStore(), 0, 1  # type: ignore[attr-defined]
    if "RANK" in os.environ:
        store, rank, world_size = fresh_store(timeout)
    dist.init_process_group(
        backend(),
        timeout=timeout,
        store=store,
        rank=rank,
        world_size=world_size,
        device_id=local_device() if has_cuda() else None,  # NCCL guesses the device from the rank otherwise
    )
    try:
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=parallel.expert_tensor_ranks,
            distributed_timeout_minutes=parallel.distributed_timeout_minutes,
            create_gloo_process_groups=True,
        )
        replica_group(timeout)
        adam.install()
        multi_tensor.install()
        wgrad.install()
        stage_seed = seed + 100 * mpu.get_pipeline_model_parallel_rank()  # or stages would begin with equal weights
        torch.manual_seed(stage_seed)
        tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)
        yield
    finally:
        mpu.destroy_model_parallel()
        dist.destroy_process_group()


def is_reader() -> bool:
    """Whether this rank reads data: the first rank of the first pipeline stage, once per data-parallel rank."""
    return (
        mpu.get_tensor_model_parallel_rank() == 0
        and mpu.get_context_parallel_rank() == 0
        and mpu.is_pipeline_first_stage(ignore_virtual=True)
    )


def replicas_share_experts() -> bool:
    """Whether some layer's experts lie on ranks of several replicas, so that all must run the same forward passes."""
    ranks = mpu.get_expert_model_parallel_world_size() * mpu.get_expert_tensor_parallel_world_size()
    stage = mpu.get_tensor_model_parallel_world_size() * mpu.get_context_parallel_world_size()
    return mpu.get_expert_model_parallel_world_size() > 1 and stage % ranks > 0


def from_first_replica(value: torch.Tensor) -> torch.Tensor:
    """Hand the first replica's ``value`` to all, where replicas share experts; theirs is overwritten.

    They compute the same, but not to the last bit. Nor do the context-parallel ranks of one that share its experts.
    """
    if mpu.get_expert_model_parallel_world_size() == 1:
        return value
    group = data_group() if replicas_share_experts() else mpu.get_context_parallel_group()
    if group.size() > 1:
        dist.broadcast(value, dist.get_global_rank(group, 0), group=group)
    return value


_replica: tuple[Any, int, Any] | None = None
"""The job's group, the number of its replicas, and the group of this rank's."""


def replica_group(timeout: timedelta | None = None) -> Any:
    """Return the group of this data-parallel replica: all TP x CP x PP ranks. A collective over the job at CP > 1.

    Args:
        timeout: of its collectives, for the call that makes it.
    """
    global _replica
    if mpu.get_context_parallel_world_size() == 1:
        return mpu.get_model_parallel_group()
    world, replicas = dist.group.WORLD, mpu.get_data_parallel_world_size()
    if _replica is None or _replica[:2] != (world, replicas):
        # Megatron-Core has no such group; it counts ranks by tensor, context, data, then pipeline.
        ranks, stages = dist.get_world_size(), mpu.get_pipeline_model_parallel_world_size()
        width = ranks // replicas // stages
        groups = []
        for replica in range(replicas):
            firsts = [width * (replica + replicas * stage) for stage in range(stages)]
            groups.append(
                dist.new_group([first + index for first in firsts for index in range(width)], timeout=timeout)
            )
        _replica = world, replicas, groups[mpu.get_data_parallel_rank()]
    return _replica[2]


def stage_group() -> Any:
    """Return the group of the ranks of this stage of this replica: TP x CP."""
    if mpu.get_context_parallel_world_size() == 1:
        return mpu.get_tensor_model_parallel_group()
    return mpu.get_tensor_and_context_parallel_group()


def data_group() -> Any:
    """Return the group over which losses and counts of positions are summed: DP x CP."""
    return mpu.get_data_parallel_group(with_context_parallel=True)


def is_first_stage() -> bool:
    """Whether this rank holds the first pipeline stage, with tower and connector."""
    return mpu.is_pipeline_first_stage(ignore_virtual=True)


def is_last_stage() -> bool:
    """Whether this rank holds the last pipeline stage, where the loss is."""
    return mpu.is_pipeline_last_stage(ignore_virtual=True)


def is_logging_rank() -> bool:
    """Whether this rank writes the log and ``metrics.jsonl``: the first of the job, which also reads data."""
    return dist.get_rank() == 0


def is_tensorboard_rank() -> bool:
    """Whether this rank writes TensorBoard: the last of the job, which has the loss and reads no data."""
    return dist.get_rank() == dist.get_world_size() - 1


@contextlib.contextmanager
def agreed(what: str) -> Iterator[None]:
    """Make what may fail on one rank fail on all of them; a collective over the whole job at the end of the block.

    Without it, a rank that raises leaves the others waiting in their next collective until it times out. Of ranks that
    failed, the first one tells the user.

    Args:
        what: the work in words, for the ranks that did not fail themselves.

    Raises:
        Exception: the block's own error, where it failed.
        OtherRankError: another rank failed.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    # The first rank that failed is the one that is furthest from the end.
    votes = torch.zeros(2, dtype=torch.int32, device=local_device())
    if failure is not None:
        votes[0] = dist.get_world_size() - dist.get_rank()
        votes[1] = WRONG_INPUT if for_users(failure) else FAILED
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    furthest, exit_code = votes.tolist()
    if failure is not None:
        set_speaker(failure, dist.get_world_size() - furthest)
        raise failure
    if furthest:
        raise OtherRankError(f"{what} failed on another rank; its message says why", exit_code)


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is true on at least one rank; a collective over the whole job."""
    votes = torch.tensor([int(flag)], dtype=torch.int32, device=local_device())
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def any_rank_of(flags: Sequence[bool]) -> list[bool]:
    """Whether each of ``flags`` is true on at least one rank; one collective over the whole job."""
    votes = torch.tensor([int(flag) for flag in flags], dtype=torch.int32, device=local_device())
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


def from_first_rank(value: torch.Tensor | None) -> torch.Tensor | None:
    """Hand a uint8 tensor of the job's first rank to all; a collective over the whole job.

    Args:
        value: [H, W, C] uint8 or None on the first rank; not looked at on the others.
    """
    first = dist.get_rank() == 0
    shape = list(value.shape) if first and value is not None else [0, 0, 0]
    header = torch.tensor(shape, dtype=torch.int64, device=local_device())
    dist.broadcast(header, 0)
    if not header.any():
        return None
    empty = torch.empty(header.tolist(), dtype=torch.uint8, device=local_device())
    pixels = value.to(local_device()).contiguous() if first and value is not None else empty
    dist.broadcast(pixels, 0)
    return pixels.cpu()


_GLOO_LOST = re.compile(r"\[\S*/gloo/transport/\S+:\d+\] |Application timeout caused pair closure$")
"""How gloo's transport begins what it says: with the place in its own source; of a pair closed before, no place."""


def is_lost_peer(error: BaseException) -> bool:
    """Whether ``error`` is a collective that broke or timed out, as another rank died or hangs.

    NCCL, the store and the rendezvous have exceptions of their own. Gloo has not: what its transport raises is a plain
    ``RuntimeError`` that begins with the line of its source. An error that merely speaks of these is none of them, and
    one that was raised from such an error is.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, dist.DistError):
            return True
        if type(cause) is RuntimeError and _GLOO_LOST.match(str(cause)):
            return True
        cause = cause.__cause__
    return False
