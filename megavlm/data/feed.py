"""From the one reader of a data-parallel replica to all its ranks: micro-batches of a step, on the device.

The reader rank (tensor rank 0 of the first stage) reads, packs and decodes ahead in a thread. Once per step it
hands tokens, labels and segment borders to every rank of its replica, and uint8 pixels to the first stage only,
so that nobody decodes twice and all tensor-parallel ranks see equal pixels.

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
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megavlm.data.batch import Pack
from megavlm.data.media import Arrangement, ImageLayout, ImagePlan, ImageShape, arrange
from megavlm.data.read_pack import ReadPack, decode_pack
from megavlm.layers.segments import packed_segments, to_device
from megavlm.parallel.device import local_device, use_local_device
from megavlm.parallel.state import any_rank, is_first_stage, is_reader

if TYPE_CHECKING:
    from megavlm.data.decode import ImageDecoder
    from megavlm.data.quarantine import Quarantine

logger = logging.getLogger(__name__)


@dataclass
class MicroBatch:
    """One pack on the device of one rank."""

    tokens: Tensor
    """[1, S] int64."""
    labels: Tensor
    """[1, S] int64, already shifted; IGNORE_INDEX where there is nothing to predict."""
    position_ids: Tensor
    """[1, S] int64, from 0 in each segment."""
    packed_seq_params: PackedSeqParams
    """Segment borders for Megatron-Core."""
    segment_sources: Tensor
    """[G] int64: index of each segment's data set; -1 for padding."""
    images: Tensor | None
    """[V, 3, H, W] uint8 views on the first stage; None on the others."""
    num_images: int
    """N, on every stage."""
    num_views: int
    """V, on every stage: one for each image but where the image plan makes several of it."""
    image_index: Tensor | None = None
    """[T, K] int64, with ``images``: the features that stand in each of the T image slots; -1 is the learned newline
    vector. None where they stay in the order of the views."""
    image_weight: Tensor | None = None
    """[T, K] float32 weights of these; None where K is 1."""

    @property
    def token_sources(self) -> Tensor:
        """[S] index of the data set that each position comes from."""
        lengths = self.packed_seq_params.cu_seqlens_q.diff().long()
        return torch.repeat_interleave(self.segment_sources, lengths, output_size=self.tokens.size(1))


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
        start = time.perf_counter()
        item = self._queue.get()
        self.counters.wait_seconds += time.perf_counter() - start
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


def micro_batch(
    pack: Pack, images: Tensor | None, device: torch.device, arrangement: Arrangement | None = None
) -> MicroBatch:
    """Put one pack on a device.

    Args:
        pack: tokens, labels, segments.
        images: [V, 3, H, W] uint8 views of its images; None on a later stage.
        device: where to.
        arrangement: where the views' features go, with ``images``.
    """

    def on_device(array: Any) -> Tensor:
        return to_device(torch.from_numpy(np.ascontiguousarray(array)), device)

    position_ids = on_device(pack.position_ids)
    index, weight = (None, None) if arrangement is None else arrangement_on(arrangement, device)
    return MicroBatch(
        tokens=on_device(pack.tokens)[None],
        labels=on_device(pack.labels)[None],
        position_ids=position_ids[None],
        packed_seq_params=packed_segments(pack.cu_seqlens, device, position_ids),
        segment_sources=on_device(pack.segment_sources.astype(np.int64)),
        images=None if images is None else images.to(device),
        num_images=len(pack.images) if images is None else images.size(0),
        num_views=len(pack.images) if images is None else images.size(0),
        image_index=index,
        image_weight=weight,
    )


def arrangement_on(arrangement: Arrangement, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Return index and weight of an arrangement on a device, as far as there are."""
    index, weight = (
        None if array is None else to_device(torch.from_numpy(array), device)
        for array in (arrangement.index, arrangement.weight)
    )
    return index, weight


class Feed:
    """The micro-batches of each step, on every rank of a data-parallel replica.

    Args:
        prefetcher: on the reader rank; None on the others.
        sequence_length: S.
        plan: what becomes of images.
        order: says from the number of views of each pack of a step, in the order of reading, in which order they
            run (indices); None leaves them as they are. A step is the same packs in any case, so the reader's state
            between steps does not know of it.
    """

    def __init__(
        self,
        prefetcher: Prefetcher | None,
        sequence_length: int,
        plan: ImagePlan,
        order: Callable[[Sequence[int]], Sequence[int]] | None = None,
    ) -> None:
        assert (prefetcher is not None) == is_reader()
        self.prefetcher, self._order = prefetcher, order
        self.sequence_length, self.plan = sequence_length, plan
        self.device = local_device()
        self.sample_keys: list[str] | None = None
        """Keys of the samples of the last step, on the reader rank."""

    def next_step(self, num_microbatches: int) -> list[MicroBatch]:
        """Return the next ``num_microbatches``; a collective over the whole job.

        Raises:
            RuntimeError: a reader failed (raised on every rank of the job; the reader's own error is logged there).
        """
        packs: list[Pack] | None = None
        pixels: Tensor | None = None
        failed = False
        if self.prefetcher is not None:
            try:
                read = [self.prefetcher.take() for _ in range(num_microbatches)]
                if self._order is not None:
                    read = [read[index] for index in self._order([item.pixels.size(0) for item in read])]
                pixels = torch.cat([item.pixels for item in read])
                packs = [item.pack for item in read]
                self.sample_keys = [key for pack in packs for key in pack.sample_keys]
            except Exception:
                logger.exception("reading data failed")
                failed = True
        # Replicas whose reader is well must not go on to a step that the others do not take.
        if any_rank(failed):
            raise RuntimeError("a reader failed; its rank's log says why")
        return share_packs(packs, pixels, num_microbatches, self.sequence_length, self.plan)

    def close(self) -> None:
        """End the reading thread."""
        if self.prefetcher is not None:
            self.prefetcher.close()


def share_packs(
    packs: list[Pack] | None, pixels: Tensor | None, num_packs: int, sequence_length: int, plan: ImagePlan
) -> list[MicroBatch]:
    """Hand packs from the reader rank to the ranks of its replica.

    Args:
        packs: on the reader rank, ``num_packs`` packs of ``sequence_length`` tokens; None there means that
            reading failed.
        pixels: on the reader rank, [V, 3, H, W] uint8 views of all packs.
        num_packs: how many.
        sequence_length: S.
        plan: what became of the images.

    Raises:
        RuntimeError: reading failed on the reader rank.
    """
    device = local_device()
    group, source = mpu.get_model_parallel_group(), mpu.get_model_parallel_src_rank()
    # Row of the header: segments and images of one pack; -1 says that reading failed.
    header = torch.full((num_packs, 2), -1, dtype=torch.int64)
    if packs is not None:
        header = torch.tensor([[len(p.segment_sources), len(p.images)] for p in packs], dtype=torch.int64)
    header = header.to(device)
    dist.broadcast(header, source, group=group)
    rows = header.tolist()
    if rows[0][0] < 0:
        raise RuntimeError("the reader of this data-parallel replica failed; its log says why")
    lengths = [_parts(segments, images, sequence_length, plan) for segments, images in rows]
    body = torch.empty(sum(map(sum, lengths)), dtype=torch.int64)
    if packs is not None:
        parts: list[np.ndarray] = []
        for p in packs:
            parts += [p.tokens, p.labels, p.cu_seqlens, p.segment_sources]
            parts += [] if plan.fixed else [np.array(p.image_shapes, np.int64).reshape(-1)]
        body = torch.from_numpy(np.concatenate(parts).astype(np.int64))
    body = body.to(device)
    dist.broadcast(body, source, group=group)
    received = _unpack(body.cpu().numpy(), rows, lengths, plan)
    views = [count for _, _, count in received]
    pixels = _share_pixels(pixels, sum(views), plan.side, device)
    shares: Sequence[Tensor | None] = [None] * num_packs if pixels is None else pixels.split(views)
    batches = []
    for (pack, layouts, count), (_, images), own in zip(received, rows, shares, strict=True):
        arrangement = None if own is None or layouts is None else arrange(plan, layouts)
        batch = micro_batch(pack, own, device, arrangement)
        batch.num_images, batch.num_views = images, count
        batches.append(batch)
    return batches


def _parts(segments: int, images: int, sequence_length: int, plan: ImagePlan) -> list[int]:
    """Return the lengths of what is sent of a pack: tokens, labels, borders, sources and, if they count, sizes."""
    return [sequence_length, sequence_length, segments + 1, segments, 0 if plan.fixed else 3 * images]


def _share_pixels(pixels: Tensor | None, num_views: int, side: int, device: torch.device) -> Tensor | None:
    """Hand [V, 3, H, W] pixels to the tensor-parallel ranks of the first stage; None on the other stages."""
    if not is_first_stage():
        return None
    if pixels is None:
        pixels = torch.empty(num_views, 3, side, side, dtype=torch.uint8)
    pixels = pixels.to(device)
    if num_views and mpu.get_tensor_model_parallel_world_size() > 1:
        dist.broadcast(pixels, mpu.get_tensor_model_parallel_src_rank(), group=mpu.get_tensor_model_parallel_group())
    return pixels


def _unpack(
    body: np.ndarray, rows: list[list[int]], lengths: list[list[int]], plan: ImagePlan
) -> list[tuple[Pack, list[ImageLayout] | None, int]]:
    """Return each pack without its files, the layouts of its images where they count, and the number of its views."""
    found, at = [], 0
    for (_, images), parts in zip(rows, lengths, strict=True):
        ends = np.cumsum(parts) + at
        tokens, labels, cu_seqlens, sources, shapes = np.split(body[at : ends[-1]], ends[:-1] - at)
        positions = np.arange(len(tokens)) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
        pack = Pack(
            tokens=tokens,
            labels=labels,
            position_ids=positions,
            cu_seqlens=cu_seqlens.astype(np.int32),
            segment_sources=sources.astype(np.int32),
            images=[],
            sample_keys=[],
            image_shapes=[ImageShape(*shape) for shape in shapes.reshape(-1, 3).tolist()],
        )
        layouts = pack.layouts(plan)
        found.append((pack, layouts, images if layouts is None else sum(len(one.views) for one in layouts)))
        at = int(ends[-1])
    return found
