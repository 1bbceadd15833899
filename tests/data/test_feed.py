"""The feed: exact restarts with packs in flight, errors that arrive, threads that end, broken images, many ranks."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import TOKENS_PER_IMAGE, encode_image, open_reader, smooth_image
from ranks import script

from megavlm.data.batch import IGNORE_INDEX, Pack, SkippedSample
from megavlm.data.chat import EncodedSample
from megavlm.data.decode import GRAY, DecodedImages, PilDecoder
from megavlm.data.device_batch import make_batch
from megavlm.data.feed import Prefetcher
from megavlm.data.packing import PackableSample, build_pack
from megavlm.data.plans_single import SquashPlan
from megavlm.data.read_pack import ReadPack, decode_pack
from megavlm.data.reader import PackReader
from megavlm.data.tokenizer import Tokenizer

Datasets = tuple[Path, Path]
SIZE = 16
PLAN = SquashPlan(SIZE, TOKENS_PER_IMAGE)
WORKER = Path(__file__).with_name("feed_worker.py")


class SlowDecoder(PilDecoder):
    """Waits before every pack, so that the state is asked for while one is being decoded."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.busy = threading.Event()

    def decode(self, *args: Any) -> DecodedImages:
        self.busy.set()
        time.sleep(self.seconds)
        return super().decode(*args)


@pytest.fixture
def prefetch(two_datasets: Datasets, tokenizer: Tokenizer) -> Iterator[Callable[..., Prefetcher]]:
    """Open a prefetcher on a training reader; closed at the end."""
    opened: list[Prefetcher] = []

    def run(
        *, num_workers: int = 0, depth: int = 3, state: object = None, source: object = None, decoder: object = None
    ) -> Prefetcher:
        source = source or open_reader(two_datasets, tokenizer, num_workers=num_workers)
        opened.append(Prefetcher(source, decoder or PilDecoder(), PLAN, tokenizer.imgpad_id, depth, state))
        return opened[-1]

    yield run
    for prefetcher in opened:
        prefetcher.close()


def contents(prefetcher: Prefetcher, count: int) -> list[tuple[object, ...]]:
    read = [prefetcher.take() for _ in range(count)]
    return [
        (r.pack.tokens.tobytes(), r.pack.labels.tobytes(), r.pack.sample_keys, r.pixels.numpy().tobytes()) for r in read
    ]


def through_json(state: object) -> object:
    return json.loads(json.dumps(state))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_restart_loses_and_repeats_nothing(prefetch: Callable[..., Prefetcher], num_workers: int) -> None:
    whole = contents(prefetch(num_workers=num_workers), 24)
    assert len(set(map(str, whole))) == 24
    running = prefetch(num_workers=num_workers)
    assert contents(running, 5) == whole[:5]
    state = through_json(running.state())
    assert len(state["in_flight"]) >= 1
    again = prefetch(num_workers=num_workers, state=state)
    # At once: most of what is in flight was not even decoded again.
    twice = through_json(again.state())
    assert contents(again, 2) == whole[5:7]
    third = prefetch(num_workers=num_workers, state=twice)
    assert contents(third, 19) == whole[5:]
    assert contents(again, 17) == whole[7:]
    assert contents(running, 19) == whole[5:]


def test_the_state_is_exact_at_any_moment(prefetch: Callable[..., Prefetcher]) -> None:
    whole = contents(prefetch(depth=1), 30)
    decoder = SlowDecoder(0.01)
    running = prefetch(depth=2, decoder=decoder)
    states = []
    for taken in range(12):
        if taken == 6:
            decoder.busy.clear()
            decoder.busy.wait(300)  # A pack is at the decoder: neither in the queue nor in the reader.
        else:
            time.sleep(0.004 * (taken % 4))
        states.append(through_json(running.state()))
        assert contents(running, 1) == whole[taken : taken + 1]
    for taken in (0, 1, 3, 6, 11):
        assert contents(prefetch(state=states[taken]), 6) == whole[taken : taken + 6], taken


def test_what_is_looked_at_is_not_taken(prefetch: Callable[..., Prefetcher]) -> None:
    """It comes again, in the same order; a state in between knows nothing of it."""
    whole = contents(prefetch(), 9)
    first = prefetch()
    assert contents(first, 2) == whole[:2]
    samples, history = first.counters.samples, first.counters.history
    looked = [*first.peek(4), *first.peek(2)]
    assert [one.pack.sample_keys for one in looked] == [keys for *_, keys, _ in (*whole[2:6], *whole[2:4])]
    assert (first.counters.samples, first.counters.history) == (samples, history)
    again = prefetch(state=through_json(first.state()))
    assert contents(first, 3) == whole[2:5] == contents(again, 3)
    second = prefetch(state=through_json(first.state()))
    assert contents(first, 4) == whole[5:9] == contents(second, 4)


def test_a_state_of_another_run_is_refused(prefetch: Callable[..., Prefetcher]) -> None:
    state = prefetch().state()
    with pytest.raises(ValueError, match="saved with num_workers 0, but this run has 1"):
        prefetch(num_workers=1, state=state)


class Failing:
    """A source that has some packs and then an error."""

    def __init__(self, packs: int, error: Exception) -> None:
        self.packs, self.error, self.closed = packs, error, 0

    def __iter__(self) -> Iterator[Pack]:
        sample = PackableSample(EncodedSample(np.arange(8), np.arange(8), 0), (), "k", 0)
        for _ in range(self.packs):
            yield build_pack([sample], 8, 0)
        raise self.error

    def close(self) -> None:
        self.closed += 1


def test_an_error_of_the_reader_arrives_and_stays(prefetch: Callable[..., Prefetcher]) -> None:
    source = Failing(3, OSError("the disk is gone"))
    prefetcher = prefetch(source=source, depth=1)
    for _ in range(3):
        assert isinstance(prefetcher.take(), ReadPack)
    for _ in range(3):
        with pytest.raises(OSError, match="the disk is gone"):
            prefetcher.take()
    prefetcher.close()
    with pytest.raises(RuntimeError, match="closed"):
        prefetcher.take()
    with pytest.raises(OSError, match="the disk is gone"):
        prefetch(source=Failing(0, OSError("the disk is gone")))
    assert source.closed == 1


def test_an_error_that_is_looked_at_arrives_and_stays(prefetch: Callable[..., Prefetcher]) -> None:
    prefetcher = prefetch(source=Failing(2, OSError("the disk is gone")))
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            prefetcher.peek(4)
    assert len(prefetcher.peek(2)) == len(contents(prefetcher, 2)) == 2
    for look in (prefetcher.take, lambda: prefetcher.peek(1), prefetcher.take):
        with pytest.raises(OSError, match="the disk is gone"):
            look()


def test_an_error_of_the_decoder_arrives(prefetch: Callable[..., Prefetcher]) -> None:
    class Broken(PilDecoder):
        def decode(self, *args: Any) -> DecodedImages:
            raise MemoryError("no room")

    prefetcher = prefetch(decoder=Broken())
    with pytest.raises(MemoryError, match="no room"):
        for _ in range(20):
            prefetcher.take()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_close_ends_thread_and_workers(prefetch: Callable[..., Prefetcher], num_workers: int) -> None:
    prefetcher = prefetch(num_workers=num_workers, depth=1)
    reader = prefetcher._source
    assert isinstance(reader, PackReader)
    workers = list(reader._loader._iterator._workers) if num_workers else []
    prefetcher.take()
    assert len(workers) == num_workers and all(worker.is_alive() for worker in workers)
    prefetcher.close()
    prefetcher.close()
    assert not prefetcher._thread.is_alive() and not any(worker.is_alive() for worker in workers)


def test_workers_are_forked_before_the_thread_starts(
    two_datasets: Datasets, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = open_reader(two_datasets, tokenizer, num_workers=1)
    workers = []
    start = threading.Thread.start

    def spy(thread: threading.Thread) -> None:
        if thread.name == "megavlm-prefetch":
            workers.append(len(reader._loader._iterator._workers))
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", spy)
    Prefetcher(reader, PilDecoder(), PLAN, tokenizer.imgpad_id, depth=1).close()
    assert workers == [1]


def test_taking_does_not_wait_for_the_reader(prefetch: Callable[..., Prefetcher]) -> None:
    class Stuck(Failing):
        def __iter__(self) -> Iterator[Pack]:
            packs = super().__iter__()
            yield next(packs)
            yield next(packs)
            hold.wait(300)
            yield next(packs)

    hold = threading.Event()
    prefetcher = prefetch(source=Stuck(5, OSError()), depth=4)
    start = time.perf_counter()
    for _ in range(2):
        prefetcher.take()
    assert time.perf_counter() - start < 200
    hold.set()
    prefetcher.take()


def broken_image_pack() -> Pack:
    """Segments: no image; a good and a bad one; a good one; padding."""
    good = encode_image(smooth_image(1, 40, 30))

    def sample(length: int, images: tuple[bytes, ...]) -> PackableSample:
        tokens = np.arange(100, 100 + length)
        for i in range(len(images)):
            tokens[1 + 4 * i : 4 + 4 * i] = 7
        return PackableSample(EncodedSample(tokens, tokens.copy(), len(images)), images, "k", 0)

    samples = [sample(5, ()), sample(12, (good, good[: len(good) // 2])), sample(9, (good,))]
    pack = build_pack(samples, 30, pad_token=0)
    pack.restore_key = "key"
    pack.skipped = [SkippedSample("k", "s.tar", str(i), "too long") for i in range(2)]
    return pack


def test_a_sample_with_a_broken_image_loses_its_labels() -> None:
    pack, before = broken_image_pack(), broken_image_pack()
    read = decode_pack(pack, PilDecoder(), SquashPlan(SIZE, 3), image_token_id=7)
    assert [sample.cause for sample in read.masked] == ["bad image (not an image)"] and read.pixels.shape == (
        3,
        3,
        SIZE,
        SIZE,
    )
    assert (read.pixels[1] == GRAY).all() and torch.equal(read.pixels[0], read.pixels[2])
    assert (pack.labels[5:17] == IGNORE_INDEX).all() and (before.labels[5:16] != IGNORE_INDEX).any()
    kept = np.r_[0:5, 17:30]
    assert np.array_equal(pack.labels[kept], before.labels[kept]) and np.array_equal(pack.tokens, before.tokens)


def test_what_is_lost_is_counted_when_a_pack_is_taken(tokenizer: Tokenizer) -> None:
    class Source(Failing):
        def __iter__(self) -> Iterator[Pack]:
            while True:
                yield broken_image_pack()

    prefetcher = Prefetcher(Source(0, OSError()), PilDecoder(), SquashPlan(SIZE, 3), 7, depth=4)
    try:
        time.sleep(0.2)
        assert not prefetcher.counters.skipped
        for _ in range(3):
            prefetcher.take()
        assert prefetcher.counters.skipped == {"too long": 6, "bad image (not an image)": 3}
        assert prefetcher.counters.samples == 3 * (3 + 2)
        assert prefetcher.counters.wait_seconds >= 0
    finally:
        prefetcher.close()


def test_a_pack_on_the_device() -> None:
    pack = broken_image_pack()
    batch = make_batch(pack, None, torch.device("cpu"))
    assert batch.tokens.shape == batch.labels.shape == batch.position_ids.shape == (1, 30)
    assert batch.num_images == 3 and batch.images is None
    params = batch.packed_seq_params
    assert params.qkv_format == "thd" and params.max_seqlen_q == params.max_seqlen_kv == 12
    assert batch.token_sources.tolist() == [0] * 26 + [-1] * 4


@pytest.mark.dist
def test_all_ranks_see_the_packs_and_the_errors() -> None:
    output = script(WORKER, "2x2", "1x2", "2x1", world=4, timeout=600).output
    assert output.count("is well") == 3 * 4, output
