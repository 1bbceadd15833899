"""From the one reader of a data-parallel replica to all its ranks: micro-batches of a step, on the device.

The reader rank (tensor rank 0 of the first stage) reads, packs and decodes ahead in a thread. Once per step it
hands tokens, labels and segment borders to the ranks of its replica, and uint8 pixels to the first stage only
(:mod:`megavlm.data.device_batch`), so that nobody decodes twice and all tensor-parallel ranks see equal pixels.

Shape legend: see :mod:`megavlm.data.batch`; M micro-batches of a step.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from megavlm.data.batch import Pack
from megavlm.data.device_batch import Batch, Spread, share_packs
from megavlm.data.media import ImagePlan
from megavlm.data.read_pack import ReadPack, decode_pack
from megavlm.parallel.device import use_local_device
from megavlm.parallel.state import any_rank, is_reader

if TYPE_CHECKING:
    from megavlm.data.decode import ImageDecoder
    from megavlm.data.quarantine import Quarantine

logger = logging.getLogger(__name__)


@dataclass
class FeedCounters:
    """What happened up to the last pack that was taken, on the reader rank; written by :meth:`Prefetcher.take`."""

    samples: int = 0
    """Samples read, good and bad, over all restarts of the run."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Those left out, or left without labels, by cause, over all restarts of the run."""
    wait_seconds: float = 0.0
    """Time spent waiting for packs."""
    history: str = ""
    """SHA-256 over the keys of all samples taken, in their order, over all restarts: equal histories saw the same."""

    def remember(self, keys: Sequence[str]) -> None:
        """Add a pack's samples to the history."""
        self.history = sha256("\n".join([self.history, *keys]).encode()).hexdigest()


class PackSource(Protocol):
    """What the feed needs of a reader: see :class:`megavlm.data.reader.PackReader`."""

    def __iter__(self) -> Iterator[Pack]: ...

    def state(self) -> Any:
        """Return what :meth:`restore` needs to go on after the last pack."""

    def restore(self, state: Any) -> None:
        """Go on where :meth:`state` was called."""

    def restore_pack(self, restore_key: Any) -> Pack:
        """Make a pack again from its ``restore_key``."""
        ...


class Prefetcher:
    """Reads and decodes packs in a thread, ``depth`` ahead; knows the state that makes a run go on exactly.

    The state is the reader's, taken between two packs, and the restore keys of the packs that were read but not
    yet handed out. The first pack is read by the constructor, in the calling thread: a reader with worker processes
    forks them then, before this object has a thread.

    Args:
        source: where packs come from; it belongs to the prefetcher from now on, which closes it if it can be closed.
        decoder: makes pixels of image files.
        plan: what becomes of images.
        image_token_id: the token in those slots.
        depth: packs to read ahead.
        state: the state of an earlier run, to go on from.
        quarantine: list of the samples that are left out.

    Raises:
        UserError: the state does not fit the source.
    """

    def __init__(
        self,
        source: PackSource,
        decoder: ImageDecoder,
        plan: ImagePlan,
        image_token_id: int,
        depth: int,
        state: dict[str, Any] | None = None,
        quarantine: Quarantine | None = None,
    ) -> None:
        self._source, self._decoder, self._plan, self._image_token_id = source, decoder, plan, image_token_id
        self.counters, self._quarantine = FeedCounters(), quarantine
        # Read, and not handed to the decoder yet.
        self._pending: deque[Pack] = deque()
        # Restore keys of the packs after that, until they are taken: being decoded or in the queue.
        self._in_flight: deque[Any] = deque()
        self._queue: queue.Queue[ReadPack | BaseException] = queue.Queue(maxsize=depth)
        # Looked at ahead of time, and not taken.
        self._peeked: deque[ReadPack | BaseException] = deque()
        # Held while a pack moves from the reader to _in_flight: the state is taken between two packs.
        self._reading = threading.Lock()
        self._stop = threading.Event()
        try:
            if state is not None:
                counters = state.get("counters", {})
                self.counters.samples = counters.get("samples", 0)
                self.counters.skipped.update(counters.get("skipped", {}))
                self.counters.history = counters.get("history", "")
                source.restore(state["reader"])
                self._pending.extend(source.restore_pack(key) for key in state["in_flight"])
            self._packs = iter(source)
            self._pending.append(next(self._packs))
        except BaseException:
            self._close_source()
            raise
        self._thread = threading.Thread(target=self._run, name="megavlm-prefetch", daemon=True)
        self._thread.start()

    def take(self) -> ReadPack:
        """Return the next pack; waits for it. One thread may take.

        Raises:
            BaseException: what the reader or the decoder raised in its thread; again on every later call.
            RuntimeError: the prefetcher was closed.
        """
        item = self._peeked.popleft() if self._peeked else self._wait()
        if isinstance(item, BaseException):
            # The thread has ended: this is the last item, also for the next call.
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(item)
            raise item
        # No lock: the thread may hold it for as long as reading a pack takes.
        self._in_flight.popleft()
        skipped = [*item.pack.skipped, *item.masked]
        self.counters.samples += len(item.pack.sample_keys) + len(item.pack.skipped)
        self.counters.skipped.update(sample.cause for sample in skipped)
        self.counters.remember(item.pack.sample_keys)
        if skipped and self._quarantine is not None:
            self._quarantine.add(skipped)
        return item

    def peek(self, count: int) -> list[ReadPack]:
        """Return the next ``count`` packs without taking them: :meth:`take` returns the same, and the state has them.

        Raises:
            BaseException: what the reader or the decoder raised in its thread, at one of them.
        """
        while len(self._peeked) < count and not (self._peeked and isinstance(self._peeked[-1], BaseException)):
            self._peeked.append(self._wait())
        found = []
        for item in islice(self._peeked, count):
            if isinstance(item, BaseException):
                raise item
            found.append(item)
        return found

    def _wait(self) -> ReadPack | BaseException:
        start = time.perf_counter()
        item = self._queue.get()
        self.counters.wait_seconds += time.perf_counter() - start
        return item

    def state(self) -> dict[str, Any]:
        """Return what :class:`Prefetcher` takes as ``state`` to go on after the packs taken so far.

        Waits for the pack that is being read. Not while another thread is in :meth:`take`.
        """
        with self._reading:
            waiting = [pack.restore_key for pack in self._pending]
            own = self.counters
            counters = {"samples": own.samples, "skipped": dict(own.skipped), "history": own.history}
            return {
                "reader": self._source.state(),
                "in_flight": [*self._in_flight, *waiting],
                "counters": counters,
            }

    def close(self) -> None:
        """End the thread and close the reader; waits for the pack that is being read. May be called again."""
        self._stop.set()
        self._thread.join()
        self._close_source()
        if self._quarantine is not None:
            self._quarantine.close()
        while not self._queue.empty():  # Nobody else puts or gets any more.
            self._queue.get_nowait()
        self._queue.put(RuntimeError("the prefetcher is closed"))

    def _close_source(self) -> None:
        close = getattr(self._source, "close", None)
        if close is not None:
            close()

    def _run(self) -> None:
        use_local_device()  # or a decoder on the GPU would stand on the first one
        while not self._stop.is_set():
            try:
                with self._reading:
                    pack = self._pending.popleft() if self._pending else next(self._packs)
                    self._in_flight.append(pack.restore_key)
                item: ReadPack | BaseException = self._decode(pack)
            except BaseException as error:
                item = error
            self._put(item)
            if isinstance(item, BaseException):
                return

    def _put(self, item: ReadPack | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def _decode(self, pack: Pack) -> ReadPack:
        return decode_pack(pack, self._decoder, self._plan, self._image_token_id)


class Feed:
    """The micro-batches of each step, on every rank of a data-parallel replica.

    Args:
        prefetcher: on the reader rank; None on the others.
        order: says from what the tower sees of each pack of a step (``ReadPack.seen``), in the order of reading, in
            which order they run (indices); None leaves them as they are. A step is the same packs in any case, so the
            reader's state between steps does not know of it.
        spread: says which rank of the replica encodes which picture; None leaves all to the first stage.
    """

    def __init__(
        self,
        prefetcher: Prefetcher | None,
        order: Callable[[Sequence[Any]], Sequence[int]] | None = None,
        spread: Spread | None = None,
    ) -> None:
        assert (prefetcher is not None) == is_reader()
        self.prefetcher, self._order, self._spread = prefetcher, order, spread
        self.sample_keys: list[str] | None = None
        """Keys of the samples of the last step, on the reader rank."""
        self._ready: list[Batch] | None = None

    def next_step(self, num_microbatches: int) -> list[Batch]:
        """Return the next ``num_microbatches``; a collective over the whole job.

        Raises:
            RuntimeError: a reader failed (raised on every rank of the job; the reader's own error is logged there).
        """
        ready, self._ready = self._ready, None
        read = self._read(num_microbatches, lambda prefetcher: [prefetcher.take() for _ in range(num_microbatches)])
        if read is not None:
            self.sample_keys = [key for item in read for key in item.pack.sample_keys]
        return share_packs(read, num_microbatches, self._spread) if ready is None else ready

    def peek_step(self, num_microbatches: int) -> list[Batch]:
        """Return what the following :meth:`next_step` does, the same list; a collective over the whole job.

        The reader's state does not know of it.

        Raises:
            RuntimeError: as :meth:`next_step`.
        """
        read = self._read(num_microbatches, lambda prefetcher: prefetcher.peek(num_microbatches))
        self._ready = share_packs(read, num_microbatches, self._spread)
        return self._ready

    def _read(self, count: int, read: Callable[[Prefetcher], list[ReadPack]]) -> list[ReadPack] | None:
        """Read the packs of a step on the reader rank, in the order in which they run; a collective over the job."""
        found: list[ReadPack] | None = None
        failed = False
        if self.prefetcher is not None:
            try:
                found = read(self.prefetcher)
                assert len(found) == count
                if self._order is not None:
                    found = [found[index] for index in self._order([item.seen for item in found])]
            except Exception:
                logger.exception("reading data failed")
                failed = True
        # Replicas whose reader is well must not go on to a step that the others do not take.
        if any_rank(failed):
            raise RuntimeError("a reader failed; its rank's log says why")
        return found

    def close(self) -> None:
        """End the reading thread."""
        if self.prefetcher is not None:
            self.prefetcher.close()
