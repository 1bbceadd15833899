"""What the formats share: records, and what is wrong with them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from megavlm.config.errors import UserError

Record = dict[str, Any]
"""A record in Qwen-VL's form, see :mod:`megavlm.data.schema`; still to be checked."""

_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
_TAG = re.compile(r"</?(?:img|ref|box|quad)>")


@dataclass(frozen=True)
class Broken:
    """Something in the input that cannot become a record."""

    id: Any
    """Its id in the input, None where it has none."""
    cause: str
    """A short cause, the same for all of its kind."""
    reason: str
    """One line for the user."""


class BrokenError(UserError):
    """Raised while one record is made; :meth:`about` turns it into a :class:`Broken`."""

    def __init__(self, cause: str, reason: str) -> None:
        super().__init__(reason)
        self.cause = cause

    def about(self, record_id: Any) -> Broken:
        """Return what to count and list."""
        return Broken(record_id, self.cause, str(self))


def is_inside(path: str) -> bool:
    """Whether a path is relative and has no ``..``."""
    pure = PurePosixPath(path)
    return bool(path) and not pure.is_absolute() and ".." not in pure.parts and "\0" not in path


def field(record: Any, key: str, kind: type | tuple[type, ...] = str) -> Any:
    """Return ``record[key]``.

    Raises:
        BrokenError: ``record`` is no object, or has no such field of this kind.
    """
    if isinstance(record, Broken):
        raise BrokenError(record.cause, record.reason)
    if not isinstance(record, dict):
        raise BrokenError("bad record", f"a record must be an object, not {type(record).__name__}")
    value = record.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        what = "missing" if value is None else f"of type {type(value).__name__}"
        raise BrokenError("bad record", f"{key!r} is {what}")
    return value


def identity(record: Any, *keys: str) -> Any:
    """Return the first of the fields that is text or a number, or None."""
    values = (record.get(key) for key in keys) if isinstance(record, dict) else ()
    return next((value for value in values if isinstance(value, str | int)), None)


def each(entries: Iterable[Any], convert: Callable[[Any], Record], *keys: str) -> Iterator[Record | Broken]:
    """Yield what ``convert`` makes of each entry; one that it raises :class:`BrokenError` of, told by its ``keys``."""
    for entry in entries:
        if isinstance(entry, Broken):
            yield entry
            continue
        try:
            yield convert(entry)
        except BrokenError as error:
            yield error.about(identity(entry, *keys))


def plain(text: str, what: str) -> str:
    """Return text that others wrote, stripped.

    Raises:
        BrokenError: It is empty, or has tags that would mean a picture or a box here.
    """
    text = text.strip()
    if not text:
        raise BrokenError("empty text", f"{what} is empty")
    tag = _TAG.search(text)
    if tag:
        raise BrokenError("markup in text", f"{what} contains {tag[0]}, which would be read as markup")
    return text


def pair(record_id: Any, task: str, image: str, question: str, answer: str) -> Record:
    """Make a record of a picture, what is asked, and the answer."""
    return {
        "id": record_id,
        "task": task,
        "conversations": [
            {"from": "user", "value": f"<img>{image}</img>{question}"},
            {"from": "assistant", "value": answer},
        ],
    }


def language_of(text: str) -> str:
    """Return ``Chinese`` for text with Chinese characters, else ``English``."""
    return "Chinese" if _CHINESE.search(text) else "English"


def most_common(answers: Iterable[str]) -> str:
    """Return the answer that most gave; among equals, the first."""
    return Counter(answers).most_common(1)[0][0]
