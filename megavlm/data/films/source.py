"""Where a film's bytes are: in memory, or a part of a file that is read as far as it is needed.

Films are large, and many samples wait in a reader at once: of one in a shard only its place is handed on, so that the
memory of a reader does not grow with the films.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import BinaryIO, cast

MAX_FILM_BYTES = (1 << 33) - 1
"""Larger films are refused unread: a shard's entries cannot say more."""
_BUFFER = 1 << 18


@dataclass(frozen=True)
class FilePart:
    """A stretch of a file."""

    path: str
    offset: int
    size: int


FilmData = bytes | FilePart


def size_of(data: FilmData) -> int:
    """Return how many bytes there are."""
    return data.size if isinstance(data, FilePart) else len(data)


def opened(data: FilmData) -> BinaryIO:
    """Return the bytes as a file that can be sought in; whoever asks closes it.

    Raises:
        OSError: The file is not there, or cannot be read.
    """
    if isinstance(data, bytes):
        return io.BytesIO(data)
    return cast(BinaryIO, io.BufferedReader(_PartOfFile(data), _BUFFER))


def read_all(data: FilmData) -> bytes:
    """Return all bytes; for what is small."""
    if isinstance(data, bytes):
        return data
    with opened(data) as file:
        return file.read()


class _PartOfFile(io.RawIOBase):
    """A part of a file as a file of its own; it ends where the part does."""

    def __init__(self, part: FilePart) -> None:
        self._part, self._at = part, 0
        self._file = os.open(part.path, os.O_RDONLY | os.O_CLOEXEC)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        most = max(0, min(len(buffer), self._part.size - self._at))
        data = os.pread(self._file, most, self._part.offset + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._part.size}[whence]
        if base + offset < 0:
            raise ValueError("negative seek position")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        if not self.closed:
            os.close(self._file)
        super().close()
