"""What is written is compared with what the disk holds: each region, while more is written, in bounded memory."""

from __future__ import annotations

import itertools
import os
import threading
from pathlib import Path

import pytest

from megavlm.checkpoint import readback
from megavlm.checkpoint.checksum import checksum_of
from megavlm.checkpoint.readback import ReadBack, Region
from megavlm.config.errors import MachineError


def region(path: Path, start: int, stop: int, data: bytes) -> Region:
    return Region(path, start, stop, checksum_of(bytearray(data), start, stop - start), stop - start, f"at {start}")


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, bytes]:
    data = os.urandom(1 << 20)
    (tmp_path / "file").write_bytes(data)
    return tmp_path / "file", data


def test_every_changed_bit_is_found(data: tuple[Path, bytes]) -> None:
    path, good = data
    edges = [0, 8, 4096, 4099, 500_000, len(good)]
    regions = [region(path, start, stop, good) for start, stop in itertools.pairwise(edges)]
    with ReadBack() as whole:
        for one in regions:
            whole.expect(one)
    assert whole.bytes == len(good)
    for at in (0, 7, 8, 4097, 4099, 499_999, len(good) - 1):
        bad = bytearray(good)
        bad[at] ^= 0x10
        path.write_bytes(bad)
        (hit,) = (one for one in regions if one.start <= at < one.stop)
        with pytest.raises(MachineError, match=f"file: {hit.name}: what was written differs"), ReadBack() as some:
            for one in regions:
                some.expect(one)
    path.write_bytes(good[:-1])  # and a file that is too short
    with pytest.raises(MachineError), ReadBack() as some:
        some.expect(regions[-1])


def test_a_failure_is_told_where_more_is_written(data: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    path, good = data
    monkeypatch.setattr(readback, "_FLUSH_BYTES", 1)
    wrong = region(path, 0, 64, b"\0" * len(good))
    with pytest.raises(MachineError), ReadBack() as some:
        for _ in range(10_000):
            some.expect(wrong)
        pytest.fail("nobody said a word")  # pragma: no cover
    with pytest.raises(OSError, match="No such file"), ReadBack() as some:
        some.expect(region(path.with_name("none"), 0, 1, good))


def test_pages_are_dropped_before_they_are_read(data: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    path, good = data
    order: list[str] = []
    for name in ("fdatasync", "posix_fadvise", "preadv"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *words, real=real, name=name: (order.append(name), real(*words))[1])
    with ReadBack() as one:
        one.expect(region(path, 0, len(good), good))
    assert order == ["fdatasync", "posix_fadvise", "preadv", "posix_fadvise"]


def test_an_error_of_the_writer_ends_it_at_once(data: tuple[Path, bytes]) -> None:
    path, good = data
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), ReadBack() as one:
        one.expect(region(path, 0, len(good), good))
        raise KeyboardInterrupt
    assert one.bytes == 0 and threading.active_count() == before
