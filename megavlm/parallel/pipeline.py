"""The one place that runs micro-batches through the pipeline: training steps and all forward-only work.

What a micro-batch is, the caller knows: it gives requests of any kind, and a function that runs one model chunk on one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

Request = TypeVar("Request")
Step = Callable[[Any, Request], tuple[Tensor, Callable[[Tensor], Any]]]
"""Runs one chunk on one request: returns the chunk's output, and what the last stage makes of the last chunk's.

The output is all that goes to the next chunk: one tensor. What goes beside the residual stream stands behind it, along
the sequence (``megavlm.models.streams``).
"""


def run(
    chunks: Sequence[Any], requests: Sequence[Request], step: Step[Request], length: int, *, backward: bool = False
) -> list[Any]:
    """Run ``requests`` on Megatron-Core's schedule for the layout; a collective over the pipeline's ranks.

    Args:
        chunks: the model chunks of this rank, wrapped or bare.
        requests: the same number on all ranks; several chunks take each in turn.
        step: see :data:`Step`. With ``backward``, what it makes of the output is (sum of losses, number of tokens,
            result), as Megatron-Core's per-token loss wants them.
        length: S of every request on each rank, for the activations that go from stage to stage.
        backward: also run backward; gradients are left in the buffers. The interleaved schedule then needs a multiple
            of the stages as requests, which the recipe's rules see to; forward-only work is filled up here.

    Returns:
        On the last stage, what ``step`` made of each request, in order; on the others nothing.
    """
    if not requests:
        return []
    count = len(requests)
    # What fills up is a request that is there anyway: its result is not taken, so no state of the caller's moves.
    missing = -count % mpu.get_pipeline_model_parallel_world_size() if len(chunks) > 1 and not backward else 0

    def forward(numbered: Iterator[tuple[int, Request]], model: Any) -> tuple[Tensor, Callable[..., Any]]:
        index, request = next(numbered)
        output, take = step(model, request)
        if backward:
            return output, take
        return output, lambda values, non_loss_data=True: take(values) if index < count else None

    beside = _tell_rows(chunks, requests, learns=backward)
    data = [enumerate([*requests, *[requests[-1]] * missing]) for _ in chunks]
    with contextlib.nullcontext() if backward else torch.no_grad():
        results: list[Any] = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=data if len(chunks) > 1 else data[0],
            model=list(chunks),
            num_microbatches=count + missing,
            # Megatron-Core divides by CP, and here it is divided already, or not at all.
            seq_length=mpu.get_context_parallel_world_size() * (length * (1 + _carried(chunks[0])) + beside),
            micro_batch_size=1,
            forward_only=not backward,
            collect_non_loss_data=not backward,
        )
    return results[:count]


def _bare(chunk: Any) -> Any:
    while not hasattr(chunk, "streams") and hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _carried(chunk: Any) -> int:
    """Return how many streams a model sends from chunk to chunk beside the residual one."""
    bare = _bare(chunk)
    return bare.streams.carried if hasattr(bare, "streams") else 0


def _tell_rows(chunks: Sequence[Any], requests: Sequence[Any], *, learns: bool) -> int:
    """Tell chunks how many rows of features that layers attend to go over boundaries; return them, of all ranks.

    As many as the request with most has. A request is a ``Batch``, or has one as ``batch``.
    """
    models = [bare for chunk in chunks if getattr(bare := _bare(chunk), "crosses", False)]
    if not models:
        return 0
    batches = [getattr(request, "batch", request) for request in requests]
    rows = max(models[0].rows_beside(one.packed_seq_params, one.image_grid, learns=learns) for one in batches)
    for model in models:
        model.streams.rows = rows
    config = models[0].config
    return rows * (config.tensor_model_parallel_size if config.sequence_parallel else 1)


@contextlib.contextmanager
def evaluating(chunks: Sequence[Any]) -> Iterator[None]:
    """Put ``chunks`` into evaluation mode, without gradients, and leave every module as it was."""
    trained = [(module, module.training) for chunk in chunks for module in chunk.modules()]
    try:
        for chunk in chunks:
            chunk.eval()
        with torch.no_grad():
            yield
    finally:
        for module, was in trained:
            module.training = was


def from_first_stage(value: Any) -> Any:
    """Hand a small value of the first stage, of any kind, to all stages; theirs is not looked at."""
    if mpu.get_pipeline_model_parallel_world_size() == 1:
        return value
    group, box = mpu.get_pipeline_model_parallel_group(), [value]
    dist.broadcast_object_list(box, mpu.get_pipeline_model_parallel_first_rank(), group=group)
    return box[0]


def from_last_stage(value: Tensor) -> Tensor:
    """Hand the last stage's ``value`` to all stages; theirs, of its shape and type, is overwritten."""
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        group = mpu.get_pipeline_model_parallel_group()
        dist.broadcast(value, mpu.get_pipeline_model_parallel_last_rank(), group=group)
    return value
