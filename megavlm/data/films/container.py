"""A folder of frames as one file: a zip that compresses nothing, with the frames in their order and their rate."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from megavlm.data.films.index import MOST_STORED_FRAMES, FilmIndex
from megavlm.data.films.plan import FilmError
from megavlm.data.films.source import FilmData, opened
from megavlm.data.image_colours import Alpha
from megavlm.data.image_header import MAX_BYTES, ImageError
from megavlm.data.images import decode_with_pil, upright_size
from megavlm.data.machine import is_machine_fault

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
FRAME_RATE = 2.0
"""Frames in a second where nobody says (that of qwen-vl-utils)."""
_ABOUT = "film.json"
_MOST_ABOUT = 1 << 12
"""Bytes of it."""
_MAGIC = b"PK\x03\x04"
_DATE = (1980, 1, 1, 0, 0, 0)
_DIGITS = re.compile(r"(\d+)")


def in_order(names: Sequence[str]) -> list[str]:
    """Return names as people count: ``frame-2`` before ``frame-10``."""
    return sorted(names, key=lambda name: [int(part) if part.isdecimal() else part for part in _DIGITS.split(name)])


def write_frames(frames: Sequence[Path | bytes], rate: float, out: BinaryIO) -> None:
    """Write frames, in their order, as one file; equal frames give equal bytes.

    Raises:
        OSError: A frame cannot be read.
        FilmError: There is none, or one is too large.
    """
    if not frames:
        raise FilmError("no frames")
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as film:
        film.writestr(zipfile.ZipInfo(_ABOUT, _DATE), json.dumps({"rate": rate}))
        for number, frame in enumerate(frames):
            size = len(frame) if isinstance(frame, bytes) else frame.stat().st_size
            if size > MAX_BYTES:
                raise FilmError("too large", f"frame {number + 1} has {size:,} bytes, at most {MAX_BYTES:,}")
            data = frame if isinstance(frame, bytes) else frame.read_bytes()
            film.writestr(zipfile.ZipInfo(f"{number:07d}", _DATE), data)


def is_frames(data: FilmData) -> bool:
    """Whether it is such a file."""
    with opened(data) as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read_frames_index(data: FilmData) -> FilmIndex:
    """Return what is known of the film: its first frame's size, the number of frames and their rate.

    Raises:
        FilmError: It is damaged, or its first frame cannot be opened.
    """
    with _Opened(data) as (film, names, rate):
        width, height = upright_size(_frame(film, names, 0))
        return FilmIndex(width, height, len(names), rate, sampled=True)


def read_frames(data: FilmData, indices: Sequence[int], alpha: Alpha) -> Iterator[Image.Image]:
    """Yield frames, upright and in RGB; one at a time is held.

    Raises:
        FilmError: One cannot be decoded.
    """
    with _Opened(data) as (film, names, _):
        for index in indices:
            frame = _frame(film, names, index)
            try:
                yield decode_with_pil(frame, alpha)
            except ImageError as error:
                raise FilmError(error.cause, f"frame {index + 1}: {error}") from None


def _frame(film: zipfile.ZipFile, names: Sequence[str], index: int) -> bytes:
    """Return a frame's file.

    Raises:
        FilmError: Its bytes are damaged.
    """
    try:
        return film.read(names[index])
    except MemoryError:
        raise
    except Exception as error:  # BadZipFile where its sum differs, EOFError, NotImplementedError, ..
        if isinstance(error, OSError) and is_machine_fault(error):
            raise
        raise FilmError("broken frame", f"frame {index + 1} is damaged ({error})") from None


class _Opened:
    """The open file, the names of its frames, and their rate."""

    def __init__(self, data: FilmData) -> None:
        self._data = data

    def __enter__(self) -> tuple[zipfile.ZipFile, list[str], float]:
        self._file = opened(self._data)
        try:
            film = zipfile.ZipFile(self._file)
            if film.getinfo(_ABOUT).file_size > _MOST_ABOUT:  # a few bytes that stand for gigabytes
                raise ValueError(f"{_ABOUT} is too large")
            about = json.loads(film.read(_ABOUT))
            rate = float(about["rate"])
            entries = [one for one in film.infolist() if one.filename != _ABOUT]
        except MemoryError:
            raise
        except Exception as error:  # zipfile raises what it comes across: BadZipFile, KeyError, NotImplementedError, ..
            self._file.close()
            if isinstance(error, OSError) and is_machine_fault(error):
                raise
            raise FilmError("not a film", f"a folder of frames that is damaged ({error})") from None
        bad = next(
            (one for one in entries if one.compress_type != zipfile.ZIP_STORED or one.file_size > MAX_BYTES), None
        )
        if bad is not None or not entries or not 0 < rate < float("inf") or len(entries) > MOST_STORED_FRAMES:
            self._file.close()
            raise FilmError("not a film", "a folder of frames that megavlm prepare has not written")
        return film, sorted(one.filename for one in entries), rate

    def __exit__(self, *_: object) -> None:
        self._file.close()
