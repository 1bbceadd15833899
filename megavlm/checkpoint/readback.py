"""What is written is read back from the disk and compared, on a second thread while the next is written.

A digest is made of the bytes as they are written; what is then in the file is flushed, its pages are dropped from the
page cache, so that the disk answers and not the memory, and it is read once.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from dataclasses import dataclass
from pathlib import Path

from megavlm.checkpoint.checksum import checksum_of, numbers_of
from megavlm.config.errors import MachineError
from megavlm.parallel.faults import flipped

PIECE_BYTES = 128 << 20
"""Largest region that is read at once: the buffer that this takes."""
_FLUSH_BYTES = 256 << 20
"""What is written before it is flushed and read: a flush of each tensor would wait for the disk each time."""
_AHEAD = 16


@dataclass(frozen=True)
class Region:
    """A part of a file, and what must be in it."""

    path: Path
    start: int
    stop: int
    digest: int
    """:func:`megavlm.checkpoint.checksum.checksum_of` its numbers."""
    numbers: int
    """Their bytes."""
    name: str
    """For the message."""
    archive: bool = False
    """Whether the numbers lie in what ``torch.save`` makes of a tensor, or are the region."""


class ReadBack:
    """Takes regions as they are written, and compares them with what the disk holds. Use it as a context.

    The end of the block waits until all is compared; a block that raises gives up at once.

    Raises:
        MachineError: some region differs; at the end, or earlier where more is written.
        OSError: it cannot be read.
    """

    def __init__(self) -> None:
        self.bytes = 0
        """Of the numbers that were compared."""
        self._regions: queue.Queue[Region | None] = queue.Queue(maxsize=_AHEAD)
        self._buffer = bytearray()
        self._failure: BaseException | None = None
        self._given_up = False
        self._thread = threading.Thread(target=self._run, name="read-back", daemon=True)

    def __enter__(self) -> ReadBack:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._given_up = kind is not None
        self._regions.put(None)
        self._thread.join()
        if kind is None:
            self._raise()

    def expect(self, region: Region) -> None:
        """Compare a region, some time; its bytes must have been handed to the system."""
        self._raise()
        self._regions.put(region)

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        """Collect regions, and compare them when there are enough; after a failure only collect."""
        waiting: list[Region] = []
        size = 0
        while True:
            region = self._regions.get()
            full = region is None or size >= _FLUSH_BYTES or bool(waiting and region.path != waiting[0].path)
            if full and not self._given_up and self._failure is None:
                try:
                    self._compare(waiting)
                except BaseException as error:  # told where more is written, or at the end
                    self._failure = error
            if full:
                waiting, size = [], 0
            if region is None:
                return
            waiting.append(region)
            size += region.stop - region.start

    def _compare(self, regions: list[Region]) -> None:
        if not regions:
            return
        path = regions[0].path
        start, stop = min(one.start for one in regions), max(one.stop for one in regions)
        largest = max(regions, key=lambda one: one.stop - one.start)
        _spoil(path, (largest.start + largest.stop) // 2)
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(handle)
            _drop(handle, start, stop)
            for one in regions:
                if self._given_up:
                    return
                self._check(handle, one)
            _drop(handle, start, stop)  # nobody reads it again soon
        finally:
            os.close(handle)

    def _check(self, handle: int, region: Region) -> None:
        size = region.stop - region.start
        if len(self._buffer) < size:
            self._buffer = bytearray(size)
        buffer = memoryview(self._buffer)[:size]
        done = 0
        while done < size and (got := os.preadv(handle, [buffer[done:]], region.start + done)):
            done += got
        begin, numbers = 0, done
        if region.archive:
            try:
                begin, numbers = numbers_of(buffer[:done])
            except ValueError as error:
                raise _lied(region, str(error)) from None
        if numbers != region.numbers or checksum_of(buffer, begin, numbers) != region.digest:
            raise _lied(region, "other bytes")
        self.bytes += numbers


def _lied(region: Region, how: str) -> MachineError:
    return MachineError(
        f"{region.path.name}: {region.name}: what was written differs from what the disk holds ({how}). Nothing is "
        "kept: see the disk's health, and try again on another one"
    )


def _drop(handle: int, start: int, stop: int) -> None:
    """Drop pages of the cache, where the system can: else the cache is what is compared."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(handle, start, stop - start, os.POSIX_FADV_DONTNEED)


def _spoil(path: Path, at: int) -> None:
    """Change a byte of the file where a test asks for it."""
    if flipped("conversion.before_read_back"):
        with path.open("r+b") as file:
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 1]))
