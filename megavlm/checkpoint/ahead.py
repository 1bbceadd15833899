"""What is written next is read on a second thread while something else is being written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

AHEAD_BYTES = 1 << 30
"""What a piece may have to be read while the one before it is being written: two are in memory then."""
WAITING_BYTES = 256 << 20
"""Several may be read ahead, while they have no more than this together: of one the writer waits for the slow ones."""

Read = TypeVar("Read", covariant=True)


class ToBeRead(Protocol[Read]):
    """What is read at once."""

    @property
    def nbytes(self) -> int:
        """Its size in memory."""

    @property
    def read(self) -> Callable[[], Read]:
        """Read it, on any thread."""


class ReadAhead(Generic[Read]):
    """Reads what follows a piece on a second thread while that one is being written; never two at once.

    Reading waits for a disk, puts tensors together and looks for infinities; writing does the zip's CRC and copies into
    the page cache: one after the other they take twice as long.

    Args:
        pieces: in the order in which they will be asked for.
    """

    def __init__(self, pieces: Sequence[ToBeRead[Read]]) -> None:
        self._pieces, self._numbers = pieces, {id(piece): number for number, piece in enumerate(pieces)}
        self._thread = ThreadPoolExecutor(1, "read ahead")
        self._waiting: dict[int, Future[Read]] = {}

    def read(self, piece: ToBeRead[Read]) -> Read:
        """Return what a piece reads, or raise what it raises; and begin with those behind it."""
        number = self._numbers[id(piece)]
        waiting = self._waiting.pop(number, None)
        if waiting is None:
            self.wait()
            found = piece.read()
        else:
            found = waiting.result()
        total, following = sum(self._pieces[one].nbytes for one in self._waiting), number + 1
        while following < len(self._pieces):
            size = self._pieces[following].nbytes
            if following not in self._waiting:
                total += size
                if size > AHEAD_BYTES or (self._waiting and total > WAITING_BYTES):
                    break
                self._waiting[following] = self._thread.submit(self._pieces[following].read)
            following += 1
        return found

    def wait(self) -> None:
        """Let what was begun and is not wanted come to its end."""
        for one in self._waiting.values():
            if not one.cancel():
                one.exception()
        self._waiting.clear()

    def close(self) -> None:
        """End the thread."""
        self.wait()
        self._thread.shutdown()
