"""Between HTTP and the model: requests wait in a bounded queue, and the model answers those that wait together.

The model stays on the process's main thread, where its process groups, its device and ``no_grad`` are set; HTTP runs
on a thread of its own. A request holds one of a fixed number of slots from its first byte to its last, so that
what waits, also bodies that are still being read, has a bound.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import torch.distributed as dist

from megavlm.config.errors import UserError
from megavlm.inference.sampling import Sampling
from megavlm.inference.server.errors import ApiError, bad_request
from megavlm.inference.server.stops import StopScanner
from megavlm.inference.session import Asked, NotFiniteError, Piece, Session
from megavlm.parallel.state import is_lost_peer

logger = logging.getLogger(__name__)

Pieces = asyncio.Queue[tuple[int, "Piece | ApiError"]]
"""What comes for the jobs of a request, by the job's index."""

_GATHER_S = 0.02


@dataclass(eq=False)
class Job:
    """An answer that is waited for; made on the HTTP thread, inside its event loop. A request with n has several."""

    asked: Asked
    prompt_tokens: int
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    gone: bool = False
    """Whether nobody waits for it any more."""
    begun: bool = False
    """Whether anything has been sent."""
    ended: bool = False
    """Whether its last piece has been sent."""
    index: int = 0
    """Which of its request's jobs this is."""
    pieces: Pieces = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def send(self, item: Piece | ApiError) -> None:
        """Hand something to the HTTP thread."""
        self.begun = True
        self.ended = self.ended or isinstance(item, ApiError) or item.finish is not None
        try:
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, (self.index, item))
        except RuntimeError:  # the loop is closed
            self.gone = True


class Worker:
    """Answers jobs.

    Args:
        model: what answers; this is rank 0, inside its ``leading()``.
        batch: most requests that are answered together.
        slots: most requests that are held at once.
        drain: seconds that answers have from :meth:`stop` on.
    """

    def __init__(self, model: Session, batch: int, slots: int, drain: float) -> None:
        self.model, self.batch, self.slots, self.drain = model, batch, slots, drain
        self.held = 0
        """Slots in use; changed on the HTTP thread alone."""
        self.answered = 0
        self.tokens = 0
        """Of answers, so far."""
        self.stopping = False
        self._deadline = float("inf")
        self._seconds = 1.0
        self._spoke = time.monotonic()
        """When the other ranks last heard of this one."""
        # put() of a SimpleQueue may be called from a signal handler.
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()

    # On the HTTP thread.

    @property
    def state(self) -> str:
        """``ready``, ``busy`` (the next request gets 429) or ``stopping`` (it gets 503)."""
        return "stopping" if self.stopping else "busy" if self.held >= self.slots else "ready"

    def take_slots(self, count: int) -> None:
        """Take slots; :meth:`free_slots` gives them back.

        Raises:
            ApiError: 429, as the server is full, or 503, as it stops.
        """
        if self.stopping:
            raise ApiError(503, "the server is stopping", code="stopping", retry_after=10)
        if self.held + count > self.slots:
            wait = max(1, round(self._seconds * self.slots / self.batch))
            raise ApiError(429, f"the server is full: it holds {self.held} requests of at most {self.slots}; try again "
                           f"in {wait} s", code="queue_full", retry_after=wait)  # fmt: skip
        self.held += count

    def free_slots(self, count: int) -> None:
        """Give slots back."""
        self.held -= count

    async def answer(self, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, Piece], None]:
        """Queue the jobs of a request and yield their pieces, each with its job's index.

        Closing the iterator drops the jobs.

        Raises:
            ApiError: one cannot be answered.
        """
        arrived: Pieces = asyncio.Queue()
        for index, job in enumerate(jobs):
            job.index, job.pieces = index, arrived
            self._jobs.put(job)
        open_ends = len(jobs)
        try:
            while open_ends:
                index, item = await arrived.get()
                if isinstance(item, ApiError):
                    raise item
                open_ends -= item.finish is not None
                yield index, item
        finally:
            for job in jobs:
                job.gone = True

    # On the main thread.

    def stop(self) -> None:
        """Take no more requests, and let :meth:`run` end when those that are held are answered; for signal handlers."""
        self._deadline = min(self._deadline, time.monotonic() + self.drain)
        self.stopping = True
        self._jobs.put(None)

    def run(self) -> None:
        """Answer until :meth:`stop`.

        Raises:
            Exception: the model cannot go on; those who wait have been told.
        """
        while True:
            batch = self._next()
            if time.monotonic() > self._deadline:
                for job in batch:
                    job.send(_cut_short())
            elif batch:
                self._serve(batch)
                self._spoke = time.monotonic()
                continue
            if self.stopping and (self.held == 0 or time.monotonic() > self._deadline + 1):
                return
            if time.monotonic() - self._spoke >= self.model.idle_seconds:
                self.model.keep_waiting()
                self._spoke = time.monotonic()

    def _next(self) -> list[Job]:
        """Return the jobs that wait, at most a batch; none after some time without any."""
        batch: list[Job] = []
        self._collect(batch, 0)
        if not batch:
            self._collect(batch, 0.1 if self.stopping else self.model.idle_seconds)
        elif len(batch) < self.batch and not self.stopping:
            # They waited while others were answered, who may ask again at once: together, instead of in turns.
            time.sleep(_GATHER_S)
            self._collect(batch, 0)
        return batch

    def _collect(self, batch: list[Job], seconds: float) -> None:
        """Add jobs until the batch is full or none waits; wait at most so long for the first."""
        try:
            while len(batch) < self.batch:
                job = self._jobs.get(timeout=seconds) if seconds else self._jobs.get_nowait()
                seconds = 0
                if job is not None and not job.gone:
                    batch.append(job)
        except queue.Empty:
            pass

    def _serve(self, batch: list[Job]) -> None:
        began, before = time.monotonic(), self.tokens
        try:
            self._answer(batch)
        except Exception as error:
            alone = dist.get_world_size() == 1
            if alone and len(batch) > 1 and not any(job.begun for job in batch):
                logger.exception("a batch of %d requests failed; each is answered by itself", len(batch))
                for job in batch:
                    self._serve([job])
                return
            for job in batch:
                if not job.ended:
                    job.send(ApiError(500, "the model failed; the server's log says why", code="model_failed"))
            # Several ranks may not be at the same place any more.
            if is_lost_peer(error) or not alone:
                raise
            logger.exception("a batch of %d requests failed", len(batch))
        self.answered += len(batch)
        self._seconds = time.monotonic() - began
        logger.info("answered %d together: %d tokens in %.2f s", len(batch), self.tokens - before, self._seconds)

    def _answer(self, batch: list[Job]) -> None:
        """Answer jobs together; what is wrong with one is sent to it alone."""
        scanners = [StopScanner(job.stop) for job in batch]

        def dropped() -> list[int]:
            late = time.monotonic() > self._deadline
            return [i for i, job in enumerate(batch) if late or job.gone or job.ended]

        for pieces in self.model.ask_all(
            [job.asked for job in batch],
            max_new_tokens=[job.max_new_tokens for job in batch],
            sampling=[job.sampling for job in batch],
            dropped=dropped,
        ):
            self.tokens += len(pieces)
            for i, piece in pieces.items():
                if batch[i].ended or batch[i].gone:
                    continue
                if piece.error is not None:
                    batch[i].send(_failed(piece.error))
                    continue
                text = scanners[i].feed(piece.text, last=piece.finish is not None)
                finish = "stop" if scanners[i].hit else piece.finish
                batch[i].send(Piece(text, piece.tokens, finish, report=piece.report))
        for job in batch:
            if not job.ended:
                job.send(_cut_short())


def _failed(error: Exception) -> ApiError:
    """Return what the client of an answer is told that ended with ``error``."""
    if isinstance(error, UserError) and not isinstance(error, NotFiniteError):
        return bad_request(str(error), "messages")
    logger.error("an answer failed: %s", error)
    why = str(error) if isinstance(error, NotFiniteError) else "the model failed; the server's log says why"
    return ApiError(500, why, code="model_failed")


def _cut_short() -> ApiError:
    return ApiError(503, "the server stopped before the answer's end", code="stopping", retry_after=10)
