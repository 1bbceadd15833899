"""Pipeline schedules, simulated: when each stage runs each micro-batch, from times given for all of them.

The order of work on a rank is Megatron-Core's: one forward and one backward in turn after a warm-up (1F1B,
arXiv 2006.09503), or interleaved over model chunks (arXiv 2104.04473) in groups of as many micro-batches as there are
stages. ``tests/planning/test_schedule.py`` holds it against the order in which Megatron-Core really calls them.
Where all ranks encode (``parallel.vision_placement``), each first encodes its share of the step's pictures, and goes
backward through it behind the pipeline: :func:`around`.
Times may differ between stages and between micro-batches. Pure Python: nothing of torch is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "E", "R"]
"""Forward and backward; encoding of a rank's share of the pictures, and the way back through it."""


class Call(NamedTuple):
    """One call on a rank: the forward or backward pass of one micro-batch through one model chunk, or encoding.

    What has to do with a share of pictures has chunk and micro-batch 0.
    """

    kind: Kind
    chunk: int
    """Index of the chunk on its rank; 0 without a virtual pipeline."""
    microbatch: int


class Op(NamedTuple):
    """One call with its time, in seconds from the start of the step."""

    rank: int
    chunk: int
    microbatch: int
    kind: Kind
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What every rank of a pipeline does during a step."""

    ops: tuple[Op, ...]
    """All calls: rank by rank, in the order in which the rank makes them."""
    pipeline: int
    """Ranks of the pipeline."""
    virtual: int
    """Model chunks per rank."""

    @cached_property
    def total(self) -> float:
        """Seconds from the first start to the last end."""
        return max(op.end for op in self.ops)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Seconds that each rank works."""
        seconds = [0.0] * self.pipeline
        for op in self.ops:
            seconds[op.rank] += op.end - op.start
        return tuple(seconds)

    @property
    def bubble(self) -> float:
        """Share of the ranks' time in which they wait, between 0 and 1."""
        return 1.0 - sum(self.busy) / (self.pipeline * self.total) if self.total else 0.0

    def of(self, rank: int) -> tuple[Op, ...]:
        """Return the calls of one rank in their order."""
        return tuple(op for op in self.ops if op.rank == rank)


def rank_order(
    rank: int, microbatches: int, *, pipeline: int, virtual: int | None = None, apart: bool = False
) -> list[Call]:
    """Return the calls of a rank in the order in which Megatron-Core makes them.

    Args:
        rank: position in the pipeline, from 0.
        microbatches: micro-batches of a step.
        pipeline: ranks of the pipeline.
        virtual: model chunks per rank (2 or more), or None for the schedule that is not interleaved.
        apart: all ranks encode, before the pipeline and behind it.

    Raises:
        ValueError: the interleaved schedule does not work with so many micro-batches.
    """
    if apart:
        passes = rank_order(rank, microbatches, pipeline=pipeline, virtual=virtual)
        return [Call("E", 0, 0), *passes, Call("R", 0, 0)]
    if virtual is None:
        forward = [Call("F", 0, m) for m in range(microbatches)]
        backward = [Call("B", 0, m) for m in range(microbatches)]
        return _one_forward_one_backward(forward, backward, warmup=pipeline - rank - 1)
    if pipeline < 2 or virtual < 2:
        raise ValueError(f"an interleaved schedule needs 2 ranks and 2 chunks, not {pipeline} and {virtual}")
    if microbatches % pipeline:
        raise ValueError(f"an interleaved schedule over {pipeline} ranks needs a multiple of {pipeline} micro-batches")
    table = [
        (chunk, first + m) for first in range(0, microbatches, pipeline) for chunk in range(virtual)
        for m in range(pipeline)
    ]  # fmt: skip
    forward = [Call("F", chunk, m) for chunk, m in table]
    backward = [Call("B", virtual - 1 - chunk, m) for chunk, m in table]
    return _one_forward_one_backward(forward, backward, warmup=2 * (pipeline - rank - 1) + (virtual - 1) * pipeline)


def _one_forward_one_backward(forward: list[Call], backward: list[Call], warmup: int) -> list[Call]:
    warmup = min(warmup, len(forward))
    steady = zip(forward[warmup:], backward, strict=False)
    return [*forward[:warmup], *(work for pair in steady for work in pair), *backward[len(forward) - warmup :]]


def simulate(
    stage_forward: Sequence[Sequence[float]],
    stage_backward: Sequence[Sequence[float]],
    *,
    pipeline: int,
    virtual: int | None = None,
    p2p_seconds: float = 0.0,
) -> Timeline:
    """Simulate one step of a pipeline.

    A call starts when its rank has made the calls before it and its input is there: activations from the stage
    before, gradients from the stage behind.

    Args:
        stage_forward: [M][S] seconds of the forward pass of micro-batch m through model stage s. With a virtual
            pipeline S is pipeline x virtual, in the model's order: stage s is chunk s // pipeline of rank s % pipeline.
        stage_backward: the same of the backward pass, with recomputation if there is any.
        pipeline: ranks of the pipeline; with 1 each micro-batch goes forward and backward before the next.
        virtual: model chunks per rank, or None for the schedule that is not interleaved.
        p2p_seconds: time of a message from rank to rank, which nothing hides.

    Raises:
        ValueError: times of another shape, no micro-batch, or a number of them that the schedule does not work with.
    """
    stages = pipeline * (virtual or 1)
    if not stage_forward or len(stage_forward) != len(stage_backward):
        raise ValueError(f"times of {len(stage_forward)} forward and {len(stage_backward)} backward passes do not pair")
    if any(len(row) != stages for row in (*stage_forward, *stage_backward)):
        raise ValueError(f"each micro-batch needs times for {stages} stages (pipeline x virtual)")
    queues = [
        rank_order(rank, len(stage_forward), pipeline=pipeline, virtual=virtual) for rank in range(pipeline)
    ]  # fmt: skip
    message = p2p_seconds if pipeline > 1 else 0.0
    # When passes end, by micro-batch and stage: None while that is not known.
    forward_ends: list[list[float | None]] = [[None] * stages for _ in stage_forward]
    backward_ends: list[list[float | None]] = [[None] * stages for _ in stage_forward]
    ops: list[list[Op]] = [[] for _ in queues]
    left, progress = sum(map(len, queues)), True
    while left:
        assert progress, "the order of calls waits for itself"
        progress = False
        for rank, queue in enumerate(queues):
            own = ops[rank]
            begun, free = len(own), own[-1].end if own else 0.0
            for position in range(begun, len(queue)):
                kind, chunk, microbatch = queue[position]
                stage = chunk * pipeline + rank
                done = forward_ends[microbatch]
                if kind == "F":
                    ends, seconds = done, stage_forward[microbatch][stage]
                    ready = _sent(done[stage - 1], message) if stage else 0.0
                else:
                    ends, seconds = backward_ends[microbatch], stage_backward[microbatch][stage]
                    # The loss is on the last stage.
                    ready = _sent(ends[stage + 1], message) if stage < stages - 1 else done[stage]
                if ready is None:
                    break
                start = ready if ready > free else free
                free = ends[stage] = start + seconds
                own.append(Op(rank, chunk, microbatch, kind, start, free))
            left -= len(own) - begun
            progress = progress or len(own) > begun
    return Timeline(tuple(op for of_rank in ops for op in of_rank), pipeline, virtual or 1)


def _sent(end: float | None, message: float) -> float | None:
    """Return when what a pass gave has come to the next stage."""
    return None if end is None else end + message


def around(line: Timeline, encode: Sequence[float], home: Sequence[float], handing: float = 0.0) -> Timeline:
    """Return a step whose pictures all ranks encode before the pipeline of ``line``, and go backward through behind it.

    The pipeline begins when the last rank has encoded: each waits in the exchange of features. Gradients come home when
    the first stage has them all.

    Args:
        line: the pipeline alone.
        encode: seconds that each rank encodes.
        home: seconds that each goes backward through that.
        handing: seconds in which features, or their gradients, change ranks.
    """
    begin = max(encode) + handing
    ended = begin + max(op.end for op in line.of(0))
    ops: list[Op] = []
    for rank in range(line.pipeline):
        passes = [op._replace(start=op.start + begin, end=op.end + begin) for op in line.of(rank)]
        back = max(ended, passes[-1].end) + handing
        ops += [Op(rank, 0, 0, "E", 0.0, encode[rank]), *passes, Op(rank, 0, 0, "R", back, back + home[rank])]
    return Timeline(tuple(ops), line.pipeline, line.virtual)
