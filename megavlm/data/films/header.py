"""A film's index, made of the film, whatever it is stored as."""

from __future__ import annotations

from megavlm.data.films.container import is_frames, read_frames_index
from megavlm.data.films.index import FilmIndex
from megavlm.data.films.plan import FilmError
from megavlm.data.films.source import MAX_FILM_BYTES, FilmData, size_of
from megavlm.data.films.streams import read_stream_index
from megavlm.data.image_header import ImageError


def read_index(data: FilmData) -> FilmIndex:
    """Return a film's index, made of it.

    Raises:
        FilmError: It is no film that can be read.
        MachineError: PyAV is not installed.
    """
    size = size_of(data)
    if not size:
        raise FilmError("empty")
    if size > MAX_FILM_BYTES:
        raise FilmError("too large", f"{size:,} bytes, at most {MAX_FILM_BYTES:,}")
    try:
        return read_frames_index(data) if is_frames(data) else read_stream_index(data)
    except FilmError:
        raise
    except ImageError as error:
        raise FilmError(error.cause, str(error)) from None
