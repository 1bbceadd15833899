"""Where the time of a step goes on one rank, taken where Megatron-Core itself says that work begins and ends.

Megatron-Core marks the parts of a step by calling ``config.timers(name).start()`` and ``.stop()``. Its own
``megatron.core.timers.Timer`` waits for the device at each mark, which is not for a run that is to be fast. Here a mark
is a CUDA event on the current stream, read when the step is over (on a CPU: a reading of the clock), and outside of a
timed step there are no marks at all.

Waiting for others is seen where torch waits: in ``Work.wait`` and, for NCCL, whose blocking collectives run on the
current stream, around the calls of ``ProcessGroup``. Both are wrapped during a timed step only. Communication that does
not go through torch.distributed (inside Transformer Engine's kernels, or a replayed CUDA graph) is not seen.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._distributed_c10d import ProcessGroup, Work

from megavlm.parallel.device import has_cuda

_COLLECTIVES = (
    "allreduce",
    "allreduce_coalesced",
    "allgather",
    "_allgather_base",
    "all_gather_single",
    "allgather_into_tensor_coalesced",
    "reduce_scatter",
    "_reduce_scatter_base",
    "reduce_scatter_single",
    "reduce_scatter_tensor_coalesced",
    "broadcast",
    "reduce",
    "alltoall_base",
    "all_to_all_single",
    "barrier",
)
"""Methods of ProcessGroup that may block; which of them there are depends on torch."""

FORWARD, BACKWARD, SCHEDULE, FINISH = "forward-compute", "backward-compute", "forward-backward", "all-grads-sync"
"""Megatron-Core's names: one micro-batch forward; backward; the whole schedule; the first thing after the last one."""
ENCODE, EXCHANGE, RETURN = "vision-encode", "vision-exchange", "vision-backward"
"""Ours, where all ranks encode: the tower forward; features and their gradients on their way; the tower backward."""
HOMEWARD = "vision-return"
"""All that comes between the pipeline's last backward pass and the tower's."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one step on one rank."""

    step: float
    """From :meth:`Stopwatch.start` to :meth:`Stopwatch.stop`."""
    data: float
    """From the start to :meth:`Stopwatch.fetched`."""
    schedule: float
    """From the schedule's begin to the last backward pass of this rank's stage: computing, and waiting for others."""
    update: float
    """From there to the end: what gradients and optimizer take, and waiting for ranks that still compute."""
    forward: float
    """In forward passes, with the collectives in them."""
    backward: float
    """In backward passes, with recomputation and the collectives in them."""
    waiting_in_compute: float
    """In collectives inside of forward and backward passes: tensor parallelism, and overlapped parameters."""
    waiting_between: float
    """In communication between passes: activations and gradients that stages hand on, and waiting for them."""
    waiting_after: float
    """In collectives after the schedule: gradients, parameters, norms, and waiting for ranks that still compute."""
    encode: float = 0.0
    """Where all ranks encode: in the tower's forward pass over this rank's share of pictures, before the schedule."""
    vision_backward: float = 0.0
    """In the tower's backward pass, behind the schedule."""
    vision: float = 0.0
    """In both phases, with what goes from rank to rank and the waiting in it."""


class Stopwatch:
    """Times single steps; between :meth:`start` and :meth:`stop` it is what Megatron-Core calls ``timers``.

    Args:
        configs: Megatron-Core's configuration of each model chunk of this rank.
    """

    def __init__(self, configs: Sequence[Any]) -> None:
        self._configs = configs
        self._clock = _Clock()
        self._own_threads = _OwnThreads()
        self._undo: list[Callable[[], None]] = []
        self.running = False

    def start(self) -> None:
        """Begin a step."""
        assert not self.running
        self._marks: dict[str, _Mark] = {}
        self._waits: dict[str, list[tuple[Any, Any]]] = {"compute": [], "between": [], "after": []}
        self._fetched: Any = None
        self.running = True
        for config in self._configs:
            config.timers = self
        self._watch_communication()
        self._started = self._clock.now()

    def fetched(self) -> None:
        """The step's data is there."""
        if self.running:
            self._fetched = self._clock.now()

    def __call__(self, name: str, log_level: int | None = None) -> _Mark:
        """Return Megatron-Core's timer of that name; all levels are taken."""
        mark = self._marks.get(name)
        if mark is None:
            mark = self._marks[name] = _Mark(self._clock)
        return mark

    def stop(self, wait: Callable[[], None]) -> StepTimes | None:
        """End the step; ``wait`` waits for the device.

        Returns:
            The step's times, or None if it did not run the schedule to its end.
        """
        end = self._clock.now()
        self.cancel()
        wait()
        schedule, finish, home = (self._marks.get(name) for name in (SCHEDULE, FINISH, HOMEWARD))
        if schedule is None or finish is None or not schedule.spans or not finish.spans or self._fetched is None:
            return None
        between, total = self._clock.between, self._clock.total
        computed, last = schedule.spans[0][0], finish.spans[0][0]
        encoded, exchanged = self(ENCODE).spans, self(EXCHANGE).spans[:1]
        before, behind = between(encoded[0][0], exchanged[0][1]) if encoded else 0.0, 0.0
        if home is not None and home.spans:  # the tower's backward pass is neither schedule nor update
            last, behind = home.spans[0][0], total(home.spans)
        times = StepTimes(
            step=between(self._started, end),
            data=between(self._started, self._fetched),
            schedule=between(computed, last),
            update=between(last, end) - behind,
            forward=total(self(FORWARD).spans),
            backward=total(self(BACKWARD).spans),
            waiting_in_compute=total(self._waits["compute"]),
            waiting_between=total(self._waits["between"]),
            waiting_after=total(self._waits["after"]),
            encode=total(encoded),
            vision_backward=total(self(RETURN).spans),
            vision=before + behind,
        )
        self._clock.reuse()
        return times

    def cancel(self) -> None:
        """Take all marks away again."""
        self.running = False
        for config in self._configs:
            config.timers = None
        while self._undo:
            self._undo.pop()()

    def _place(self) -> list[tuple[Any, Any]] | None:
        """Where the step is now, as the list of its waits; None before the schedule: that is waiting for data."""
        marks = self._marks
        home = marks.get(HOMEWARD)
        if FINISH in marks or (home is not None and not home.open):
            return self._waits["after"]
        if SCHEDULE not in marks or home is not None:
            return None
        passes = (marks.get(FORWARD), marks.get(BACKWARD))
        return self._waits["compute" if any(mark is not None and mark.open for mark in passes) else "between"]

    def _watch_communication(self) -> None:
        for owner, names in ((Work, ("wait",)), (ProcessGroup, _COLLECTIVES)):
            for name in names:
                # Out of the class's own table: getattr would give a function that is no method when it is put back.
                plain = owner.__dict__.get(name)
                if plain is not None:
                    setattr(owner, name, self._timed(getattr(owner, name)))
                    self._undo.append(functools.partial(setattr, owner, name, plain))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            waits = self._place()
            # Backward passes on CUDA run in a thread of autograd; threads that save or read are not the step.
            if waits is None or not self._own_threads.here() or not self._clock.usable():
                return call(*args, **kwargs)
            begin = self._clock.now()
            try:
                return call(*args, **kwargs)
            finally:
                waits.append((begin, self._clock.now()))

        return timed


class _OwnThreads:
    """Knows which threads take the step: the one that made this, and those that Python did not start (autograd's)."""

    def __init__(self) -> None:
        self._main = threading.get_ident()

    def here(self) -> bool:
        """Whether the calling thread is one of them."""
        if threading.get_ident() == self._main:
            return True
        return isinstance(threading.current_thread(), threading._DummyThread)


class _Mark:
    """One of Megatron-Core's timers: the spans between ``start`` and ``stop``, not read yet."""

    def __init__(self, clock: _Clock) -> None:
        self._clock, self.spans, self.open = clock, list[tuple[Any, Any]](), False

    def start(self, barrier: bool = False) -> None:
        """Begin a span; Megatron-Core asks for a barrier here, which would change what is measured."""
        self.open = True
        self._begin = self._clock.now()

    def stop(self, barrier: bool = False) -> None:
        """End it."""
        self.spans.append((self._begin, self._clock.now()))
        self.open = False


class _Clock:
    """Moments on this rank's device: CUDA events on the current stream, or readings of the processor's clock."""

    def __init__(self) -> None:
        self._cuda = has_cuda()
        self._free: list[Any] = []
        self._used: list[Any] = []

    def usable(self) -> bool:
        """Whether a moment can be taken: an event inside of a CUDA graph that is being captured has no time."""
        return not self._cuda or not torch.cuda.is_current_stream_capturing()

    def now(self) -> Any:
        """Take a moment; on a GPU it is when the stream gets here."""
        if not self._cuda:
            return time.perf_counter()
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        self._used.append(event)
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Return the seconds from one moment to another; on a GPU both must have passed."""
        return begin.elapsed_time(end) / 1e3 if self._cuda else end - begin

    def total(self, spans: Sequence[tuple[Any, Any]]) -> float:
        """Return the summed seconds of spans."""
        return sum(self.between(begin, end) for begin, end in spans)

    def reuse(self) -> None:
        """Take the events for the next step."""
        self._free += self._used
        self._used = []
