"""Tar files of records, as webdataset has them: ``KEY.json`` with a record, its pictures ``KEY.jpg``, ``KEY.1.png``.

Files of one sample share their path up to the first dot of their name, and follow each other. A record names its
pictures by a file's name, or by what comes behind the key; where it names none, all pictures of the sample are its
``images``, in their order in the tar.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megavlm.config.errors import UserError
from megavlm.data.formats.base import Broken
from megavlm.data.formats.keys import is_given
from megavlm.data.image_header import MAX_BYTES
from megavlm.data.machine import is_machine_fault

SUFFIXES = (".tar", ".tar.gz", ".tgz")
_PICTURES = ("jpg", "jpeg", "png", "gif", "webp", "bmp", "tif", "tiff", "ppm")
_NAMING = frozenset({"image", "image_url", "url", "path"})
"""Keys of a part that name its picture."""
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
                    yield _sample(path, current, members)
                    members = {}
                current, last = f"{folder}{slash}{key}", member.name
                is_record = extension.lower() == "json"
                if is_record or extension.lower().rpartition(".")[2] in _PICTURES:
                    most = _LONGEST if is_record else MAX_BYTES
                    file = tar.extractfile(member) if member.size <= most else None
                    members["json" if is_record else extension] = b"" if file is None else file.read()
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        if is_machine_fault(error):
            raise
        behind = f" behind {last!r}" if last else ""
        raise UserError(f"{path} cannot be read as a tar file{behind}: {error}; fetch it again") from None
    if current is not None:
        yield _sample(path, current, members)


def _sample(path: Path, key: str, members: dict[str, bytes]) -> tuple[Any, dict[str, bytes]]:
    where = f"{path.name}/{key}"
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
    order = []
    for extension, data in members.items():
        if extension == "json":
            continue
        place = f"{where}.{extension}"
        order.append(place)
        for name in (place, f"{key}.{extension}", f"{base}.{extension}", extension):
            names[name], pictures[name] = place, data
    record = {**record, **({} if is_given(record.get("id")) else {"id": key})}
    return _with_pictures(record, names, order), pictures


def _with_pictures(record: dict[str, Any], names: dict[str, str], order: list[str]) -> dict[str, Any]:
    """Return the record with its pictures named as they are handed out."""
    for field in ("image", "images"):
        value = record.get(field)
        if not is_given(value):
            continue
        listed = value if isinstance(value, list) else [value]
        found = [
            names.get(one, names.get(one.rpartition("/")[2], one)) if isinstance(one, str) else one for one in listed
        ]
        record[field] = found if isinstance(value, list) else found[0]
    named = is_given(record.get("image")) or is_given(record.get("images"))
    return record if named or not order or _shows(record, names) else {**record, "images": order}


def _shows(value: Any, names: Mapping[str, str], key: str = "") -> bool:
    """Whether a record says by itself where pictures stand: by name in a part of a turn, or in Qwen-VL's marks."""
    if isinstance(value, dict):
        return any(_shows(inner, names, name) for name, inner in value.items())
    if isinstance(value, list):
        return any(_shows(inner, names, key) for inner in value)
    return isinstance(value, str) and ("<img>" in value or (key in _NAMING and value in names))
