"""The input of ``megavlm prepare``: a file of JSON, of JSON lines, of parquet, or a folder; read as it streams by."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from megavlm.config.errors import MissingFileError, UserError
from megavlm.data.formats import stream
from megavlm.data.formats.base import Broken, BrokenError, Record, is_inside
from megavlm.data.formats.columns import described
from megavlm.data.formats.encoding import NotUnicodeError, lines
from megavlm.data.formats.keys import has_roles, is_given
from megavlm.data.formats.tables import files_of, read_rows
from megavlm.data.image_header import MAX_BYTES
from megavlm.data.machine import is_file, is_machine_fault

_HEAD = 200
"""Records by which a file's format is told."""
_HEAD_OF_PARQUET = 16


class PictureStore(Protocol):
    """Pictures that are not in a directory."""

    url: str

    def has(self, path: str) -> bool:
        """Whether there is a picture at this path."""
        ...

    def read(self, path: str, most: int, what: str = "image") -> bytes:
        """Return its file (``what``: as messages call it), of at most ``most`` bytes, or raise :class:`BrokenError`."""
        ...


@dataclass(frozen=True)
class Source:
    """What ``megavlm prepare`` was given."""

    path: Path
    """File or directory to read."""
    images: Path
    """Directory that image paths are relative to."""
    annotations: Path | None = None
    """VQA: the file with the answers, where they are apart."""
    image_info: Path | None = None
    """Visual Genome: ``image_data.json``."""
    per_sample: int | None = None
    """Visual Genome: regions of one sample; None for the default."""
    boxes: str | None = None
    """Visual Genome: notation of boxes (:mod:`megavlm.data.box_words`); None for Qwen-VL's."""
    store: PictureStore | None = None
    """Where pictures are, in the place of :attr:`images`."""
    pictures: dict[str, bytes] = field(default_factory=dict, compare=False, repr=False)
    """Pictures that came with the row that was read last, by the path that stands for each in its record."""
    ignored: Counter[str] = field(default_factory=Counter, compare=False, repr=False)
    """Keys of conversations that nothing looks at, and how many records have each."""

    @cached_property
    def is_folder(self) -> bool:
        """Whether it is a folder of several data files, and not one that has parquet files."""
        return self.path.is_dir() and not files_of(self.path)

    @cached_property
    def is_list(self) -> bool:
        """Whether it is a list of records: JSON's, JSON lines, or rows of parquet.

        Raises:
            MissingFileError: There is no such file.
            UserError: It is not JSON.
        """
        if not self.path.exists():
            raise MissingFileError(f"{self.path} does not exist")
        if files_of(self.path) or self.path.suffix == ".jsonl":
            return True
        return not self.is_folder and stream.kind(self.path) == "["

    @cached_property
    def outline(self) -> dict[str, Any]:
        """The first members of the object that the file holds, see :func:`stream.outline`; none of anything else."""
        return {} if self.is_folder or self.is_list else stream.outline(self.path)

    @cached_property
    def head(self) -> list[Record]:
        """Objects among the first records of a list, as many as are needed to see what they are."""
        if self.is_folder or not self.is_list:
            return []
        most = _HEAD_OF_PARQUET if files_of(self.path) else _HEAD
        found: list[Record] = []
        plain = True  # so far these are conversations, and none has a picture: what they are is not clear
        for entry in self.rows():
            if isinstance(entry, dict) and (len(found) < most or not _is_plain(entry)):
                found.append(entry)
                plain = plain and _is_plain(entry)
            if len(found) >= most and not plain:
                break
        return found

    def rows(self, key: str | None = None) -> Iterator[Any]:
        """Yield the records of a list; with ``key``, of the list that the file's object has there.

        A line of a ``.jsonl`` file that is no JSON is a :class:`Broken`.

        Raises:
            MissingFileError: There is no such file.
            UserError: It is not JSON or parquet, or has no such list, or an empty one.
        """
        if key is None and not self.is_list:
            what = "is a folder; give a file" if self.is_folder else "must hold a list of records"
            raise UserError(f"{self.path} {what}, or another --format")
        empty = True
        for entry in self._rows(key):
            empty = False
            yield entry
        if empty:
            raise UserError(f"{self.path} must hold a list {f'{key!r} ' if key else ''}of records that is not empty")

    def _rows(self, key: str | None) -> Iterator[Any]:
        renamed = described(self.path) if key is None else None
        for row, pictures in self._stored(key):
            self.pictures.clear()
            self.pictures.update(pictures)
            yield row if renamed is None or not isinstance(row, dict) else renamed.apply(row)

    def _stored(self, key: str | None) -> Iterator[tuple[Any, Mapping[str, bytes]]]:
        """Yield what is stored, and the pictures that are stored in it."""
        files = files_of(self.path)
        if self.path.suffix == ".jsonl" and not self.path.is_dir():
            yield from ((_line(number, line), {}) for number, line in lines(self.path))
        elif not files:
            yield from ((element, {}) for element in stream.elements(self.path, key))
        for path in files:
            yield from read_rows(path)

    def members(self) -> Iterator[tuple[str, Any]]:
        """Yield the names and values of the object that the file holds.

        Raises:
            UserError: It is not JSON, or no object.
        """
        return stream.members(self.path)

    def below(self, path: Path) -> Source:
        """Return the same with another file; rows of both leave their pictures here."""
        return replace(self, path=path)

    def find_image(self, candidates: Sequence[str]) -> str:
        """Return the first of the paths below :attr:`images` that is there, else the first of all."""
        for path in candidates:
            if self.has_image(path):
                return path
        return candidates[0]

    @property
    def where(self) -> str:
        """Where pictures are, for messages."""
        return str(self.images) if self.store is None else self.store.url

    def has_image(self, path: str) -> bool:
        """Whether there is a picture at this path."""
        if path in self.pictures:
            return True
        return is_inside(path) and (self.store.has(path) if self.store is not None else is_file(self.images / path))

    def resolved(self, path: str, what: str, *, allow_links: bool) -> Path:
        """Return where a path from :attr:`images` leads.

        Raises:
            BrokenError: There is nothing, or it leads out by a link.
        """
        root = self.images.resolve()
        try:
            found = (root / path).resolve(strict=True)
        except (OSError, RuntimeError) as error:
            if is_machine_fault(error):
                raise
            raise BrokenError(f"{what} missing", f"{what} {path!r} does not exist in {root}") from None
        if not allow_links and not found.is_relative_to(root):
            raise BrokenError(
                f"unsafe {what} path", f"{what} {path!r} leads out of {root} by a link; --allow-links follows it"
            )
        return found

    def read_image(self, path: str, what: str = "image") -> bytes:
        """Return a picture's file, or that of ``what`` messages call otherwise: a film, or a frame.

        Raises:
            BrokenError: There is none at this path.
        """
        if path in self.pictures:
            return self.pictures[path]
        if self.store is not None and is_inside(path):
            return self.store.read(path, MAX_BYTES, what)
        if not is_inside(path) or not is_file(self.images / path):
            raise BrokenError(f"{what} missing", f"no {what} {path!r} in {self.where}")
        return (self.images / path).read_bytes()


def _is_plain(entry: Record) -> bool:
    """Whether it is a conversation without a picture, in whoever's form."""
    turns = entry.get("conversations")
    beside = ("image", "images", "video", "videos")
    if not isinstance(turns, list) or has_roles(entry) or any(is_given(entry.get(key)) for key in beside):
        return False
    texts = [turn.get("value") for turn in turns if isinstance(turn, dict)]
    return not any(isinstance(text, str) and ("<img>" in text or "<image>" in text) for text in texts)


def _line(number: int, line: str | NotUnicodeError) -> Any:
    if isinstance(line, NotUnicodeError):
        return Broken(None, "not UTF-8", str(line))
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        why = f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        return Broken(None, "bad JSON", f"line {number} is not valid JSON: {why}")
