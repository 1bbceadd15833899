"""Tar files of records, as webdataset has them: ``KEY.json``, and beside it ``KEY.jpg``, ``KEY.1.png`` or ``KEY.mp4``.

Files of one sample share their path up to the first dot of their name, and follow each other. A record names its
pictures by a file's name, or by what comes behind the key; where it names none, all pictures of the sample are its
``images``, in their order in the tar. So it is with films, which are its ``videos``.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from megavlm.config.errors import UserError
from megavlm.data.films.streams import FILM_SUFFIXES
from megavlm.data.formats.base import Broken
from megavlm.data.formats.keys import is_given
from megavlm.data.image_header import MAX_BYTES
from megavlm.data.machine import is_machine_fault

SUFFIXES = (".tar", ".tar.gz", ".tgz")
_PICTURES = ("jpg", "jpeg", "png", "gif", "webp", "bmp", "tif", "tiff", "ppm")
_FILMS = frozenset(suffix[1:] for suffix in FILM_SUFFIXES) - {*_PICTURES}
_NAMING = frozenset({"image", "image_url", "url", "path", "video", "video_url", "videos", "frames"})
"""Keys that name the picture of a part, its film, or the film's frames."""
_FIELDS = ("image", "images", "video", "videos")
_LONGEST = 1 << 28
"""Bytes of the longest record."""


def is_tar(path: Path) -> bool:
    """Whether a file's name is a tar's."""
    return path.name.endswith(SUFFIXES)


def read_rows(path: Path) -> Iterator[tuple[Any, dict[str, bytes]]]:
    """Yield each sample's record, and its pictures by the names that it may use.

    Raises:
        UserError: It is no tar file, or damaged.
    """
    members: dict[str, bytes] = {}
    large: list[str] = []
    current, last = None, ""
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                folder, slash, name = member.name.rpartition("/")
                key, _, extension = name.partition(".")
                if not key or not extension:
                    continue
                if current is not None and f"{folder}{slash}{key}" != current:
                    yield _sample(path, current, members, large)
                    members = {}
                    large.clear()
                current, last = f"{folder}{slash}{key}", member.name
                is_record = extension.lower() == "json"
                kind = extension.lower().rpartition(".")[2]
                if kind in _FILMS and member.size > MAX_BYTES:
                    large.append(member.name)
                elif is_record or kind in _PICTURES or kind in _FILMS:
                    most = _LONGEST if is_record else MAX_BYTES
                    file = tar.extractfile(member) if member.size <= most else None
                    members["json" if is_record else extension] = b"" if file is None else file.read()
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        if is_machine_fault(error):
            raise
        behind = f" behind {last!r}" if last else ""
        raise UserError(f"{path} cannot be read as a tar file{behind}: {error}; fetch it again") from None
    if current is not None:
        yield _sample(path, current, members, large)


def _sample(path: Path, key: str, members: dict[str, bytes], large: list[str]) -> tuple[Any, dict[str, bytes]]:
    where = f"{path.name}/{key}"
    if large:
        what = f"{large[0]!r} has more than {MAX_BYTES:,} bytes"
        return Broken(key, "film too large for a tar", f"{what}; unpack it, and name it as a film below --images"), {}
    text = members.get("json")
    if text is None:
        return Broken(key, "no record", f"{where} has no .json beside its pictures"), {}
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Broken(key, "bad JSON", f"{where}.json is not valid JSON: {error}"), {}
    if not isinstance(record, dict):
        return record, {}
    base = key.rpartition("/")[2]
    names: dict[str, str] = {}
    pictures: dict[str, bytes] = {}
    order: dict[str, list[str]] = {"images": [], "videos": []}
    for extension, data in members.items():
        if extension == "json":
            continue
        place = f"{where}.{extension}"
        films = extension.lower().rpartition(".")[2] in _FILMS
        order["videos" if films else "images"].append(place)
        for name in (place, f"{key}.{extension}", f"{base}.{extension}", extension):
            names[name], pictures[name] = place, data
    record = {**record, **({} if is_given(record.get("id")) else {"id": key})}
    return _with_pictures(record, names, order), pictures


def _with_pictures(record: dict[str, Any], names: dict[str, str], order: dict[str, list[str]]) -> dict[str, Any]:
    """Return the record with its pictures and films named as they are handed out."""
    for field in _FIELDS:
        value = record.get(field)
        if not is_given(value):
            continue
        listed = value if isinstance(value, list) else [value]
        found = [
            names.get(one, names.get(one.rpartition("/")[2], one)) if isinstance(one, str) else one for one in listed
        ]
        record[field] = found if isinstance(value, list) else found[0]
    added = {}
    for field, files in order.items():
        named = is_given(record.get(field[:-1])) or is_given(record.get(field))
        own = {name for name, place in names.items() if place in files}
        if files and not named and not _shows(record, own, "<img>" if field == "images" else None):
            added[field] = files
    return record | added


def _shows(value: Any, names: Container[str], mark: str | None, key: str = "") -> bool:
    """Whether a record says by itself where files stand: by name in a part of a turn, or in Qwen-VL's marks."""
    if isinstance(value, dict):
        return any(_shows(inner, names, mark, name) for name, inner in value.items())
    if isinstance(value, list):
        return any(_shows(inner, names, mark, key) for inner in value)
    if not isinstance(value, str):
        return False
    return (mark is not None and mark in value) or (key in _NAMING and value in names)
