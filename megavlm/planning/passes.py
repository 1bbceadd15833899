"""Seconds of a step's forward and backward passes through the pipeline: simulated, or bounded from below."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from megavlm.planning.layout import Layout
from megavlm.planning.schedule import Timeline, simulate
from megavlm.planning.seconds import Cost


def timeline(layout: Layout, costs: Sequence[Cost], microbatches: int, message: float) -> Timeline:
    """Simulate a step of equal micro-batches.

    Args:
        layout: the layout.
        costs: of one micro-batch through each chunk, in the model's order.
        microbatches: their number.
        message: seconds of one message between stages.
    """
    forward, backward, message = _with_messages(layout, costs, message)
    return simulate(
        [forward] * microbatches,
        [backward] * microbatches,
        pipeline=layout.pipeline,
        virtual=layout.virtual,
        p2p_seconds=message,
    )


def _with_messages(layout: Layout, costs: Sequence[Cost], message: float) -> tuple[list[float], list[float], float]:
    """Return seconds of the chunks' forward and backward passes, and of messages that go beside them."""
    forward, backward = [cost.forward for cost in costs], [cost.backward for cost in costs]
    if layout.virtual is not None:
        return forward, backward, message
    # A rank waits while it sends; interleaved, messages go beside the work and only delay the next rank's.
    forward = [seconds + message for seconds in forward[:-1]] + forward[-1:]
    backward = backward[:1] + [seconds + message for seconds in backward[1:]]
    return forward, backward, 0.0


def passes(layout: Layout, costs: Sequence[Cost], message: float, *, whole: bool) -> tuple[float, float]:
    """Return seconds and bubble of the passes; not ``whole`` simulates their beginning and goes on at that pace."""
    stages, count = layout.pipeline, layout.microbatches
    short, long = 3 * stages, 4 * stages
    if whole or count <= long:
        line = timeline(layout, costs, count, message)
        return line.total, line.bubble
    few, more = (timeline(layout, costs, number, message) for number in (short, long))
    # What the simulation's beginning adds for a micro-batch, and never less than the busiest stage works on one.
    pace = max((more.total - few.total) / (long - short), max(more.busy) / long)
    total = more.total + pace * (count - long)
    return total, 1 - sum(more.busy) * count / long / (stages * total)


def least_passes(layout: Layout, costs: Sequence[Cost], message: float) -> float:
    """Return seconds that neither way of :func:`passes` stays below, but for rounding.

    Before a stage begins, the first micro-batch has come through those before it; when it has ended, the last one still
    goes back through them.
    """
    forward, backward, _ = _with_messages(layout, costs, message)
    stages, both = layout.pipeline, [one + other for one, other in zip(forward, backward, strict=True)]
    around = [0.0, *accumulate(both[: stages - 1])]
    return max(around[stage] + layout.microbatches * sum(both[stage::stages]) for stage in range(stages))
