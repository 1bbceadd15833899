"""Reading what benchmarks are published as: JSON, JSON lines and tables; errors name file, entry and field."""

from __future__ import annotations

import base64
import binascii
import csv
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from megavlm.config.errors import UserError
from megavlm.data.formats.encoding import NotUnicodeError, lines, open_text
from megavlm.data.schema import check_unicode
from megavlm.evaluation.benchmarks.spec import Item

_LARGEST_FIELD = 1 << 30  # a picture in base64 is one field of a table


def read_json(path: Path, kind: type[Any]) -> Any:
    """Return what a JSON file holds.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is no JSON, or holds something else than ``kind``.
    """
    try:
        found = json.loads(path.read_bytes())
    except IsADirectoryError:
        raise UserError(f"{path} is a directory") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, kind):
        wanted = "list" if kind is list else "object"
        raise UserError(f"{path} must hold a JSON {wanted}")
    return found


def read_lines(path: Path) -> list[tuple[int, Any]]:
    """Return the objects of a file with one JSON object per line, each with its line number from 1.

    Empty lines are passed over.

    Raises:
        MissingFileError: there is no such file.
        UserError: a line is no JSON.
    """
    if path.is_dir():
        raise UserError(f"{path} is a directory")
    found = []
    for number, line in lines(path):
        if isinstance(line, NotUnicodeError):
            raise UserError(f"{path}: {line}")
        try:
            found.append((number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is not valid JSON: {error}") from None
    return found


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a tab-separated file with a header.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is no such table.
    """
    if path.is_dir():
        raise UserError(f"{path} is a directory")
    before = csv.field_size_limit(_LARGEST_FIELD)
    try:
        with open_text(path) as file:
            return [
                {key: value or "" for key, value in row.items() if key is not None}
                for row in csv.DictReader(file, delimiter="\t")
            ]
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a tab-separated table: {error}") from None
    finally:
        csv.field_size_limit(before)


def listed(path: Path, holder: Mapping[str, Any], name: str) -> list[Any]:
    """Return the list under ``name`` of a file's object.

    Raises:
        UserError: there is none.
    """
    found = holder.get(name)
    if not isinstance(found, list):
        raise UserError(f"{path}: has no list {name!r}")
    return found


def make_items(
    path: Path, entries: Iterable[tuple[Any, Any]], make: Callable[[Any], Iterable[Item]], what: str = "entry"
) -> list[Item]:
    """Make the items of a file's entries.

    Args:
        path: the file, for errors.
        entries: a name for errors, and the entry.
        make: entry to items; may raise ValueError with what is wrong.
        what: what an entry is called in errors.

    Raises:
        UserError: an entry is wrong, an id comes twice, or there are no items.
    """
    items: list[Item] = []
    for name, entry in entries:
        try:
            made = list(make(entry))
            for item in made:
                _check_unicode(item)
            items += made
        except UserError as error:
            raise UserError(f"{path}: {what} {name}: {error}") from None
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise UserError(f"{path}: two questions have the id {item.id}")
        seen.add(item.id)
    if not items:
        raise UserError(f"{path}: holds no question to ask")
    return items


def _check_unicode(item: Item) -> None:
    texts = {
        "its id": [item.id],
        "its question": [item.question],
        "an answer": item.answers,
        "an option": item.choices,
        "its hint": [item.hint],
        "its kind": [item.kind, item.unit],
    }
    for what, found in texts.items():
        for one in found:
            check_unicode(one, what)


def text(entry: Any, name: str, default: str | None = None) -> str:
    """Return a field that is text or a number, as text.

    Raises:
        UserError: it is missing (and there is no default), or of another type.
    """
    value = entry.get(name) if isinstance(entry, dict) else None
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(f"has no text {name!r}")
    return str(value)


def texts(entry: Any, name: str) -> tuple[str, ...]:
    """Return a field that is a list of texts or numbers.

    Raises:
        UserError: it is missing, or something else.
    """
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, list) or not all(isinstance(one, (str, int, float)) for one in value):
        raise UserError(f"has no list of texts {name!r}")
    return tuple(str(one) for one in value)


def objects(entry: Any, name: str) -> list[Any]:
    """Return a field that is a list of objects; an empty one where it is missing.

    Raises:
        UserError: it is something else.
    """
    value = entry.get(name, []) if isinstance(entry, dict) else None
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise UserError(f"{name!r} must be a list of objects")
    return value


def number(entry: Any, name: str) -> int:
    """Return a field that is a whole number.

    Raises:
        UserError: it is missing, or something else.
    """
    value = text(entry, name)
    if not value.lstrip("-").isdigit():
        raise UserError(f"{name!r} must be a whole number, not {value!r}")
    return int(value)


def picture_in(directory: Path, name: str) -> Path:
    """Return the path of a picture named by a benchmark's file.

    Raises:
        UserError: the name is empty, absolute, or leaves the directory.
    """
    path = Path(name)
    if not name or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise UserError(f"picture {name!r} must be a path inside the image directory")
    return directory / path


def from_base64(encoded: str) -> bytes:
    """Return the bytes of a picture in base64; nothing where it is damaged: the decoder then counts it as broken."""
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        return b""
