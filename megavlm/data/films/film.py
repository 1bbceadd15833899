"""A film of a sample: where its bytes are, and its index."""

from __future__ import annotations

from dataclasses import dataclass

from megavlm.data.films.index import FilmIndex
from megavlm.data.films.plan import FilmShape
from megavlm.data.films.source import FilmData, read_all


@dataclass(frozen=True)
class Film:
    """A film of a sample; small, wherever its bytes are."""

    data: FilmData
    """A film file, or frames as :mod:`megavlm.data.films.container` writes them."""
    stored: FilmData | None = None
    """Its index, where it was stored beside the film."""

    def index(self) -> FilmIndex:
        """Return its index.

        Raises:
            FilmError: It is no film that can be read.
            MachineError: PyAV is not installed.
        """
        if self.stored is not None:
            return FilmIndex.from_bytes(read_all(self.stored))
        from megavlm.data.films.header import read_index  # noqa: PLC0415 - PIL and FFmpeg

        return read_index(self.data)

    def shape(self, shown: int = 1) -> FilmShape:
        """Return what a plan asks of it, in a conversation of so many pictures and films.

        Raises:
            FilmError, MachineError: As :meth:`index`.
        """
        return self.index().shape(shown)
