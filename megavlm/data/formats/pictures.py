"""Pictures as records name them: a path, a ``file:`` or ``data:`` URL, or an object that holds one of these.

Sources: ``image_url`` of OpenAI's chat format, ``image``, ``url``, ``path`` and ``base64`` of the parts that
Transformers' chat templates take, ``bytes`` and ``path`` of the hub's ``Image`` and of ms-swift's ``images``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import MutableMapping, Sequence
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from megavlm.data.formats.base import BrokenError
from megavlm.data.formats.keys import is_given

_KEYS = ("bytes", "base64", "image_url", "image", "url", "path")
"""Where an object has a picture, the most exact first."""
_NOT_RELATIVE = re.compile(r"<img>\s*((?:/|[A-Za-z][A-Za-z0-9+.-]*://|data:)[^<\n\0]*?)\s*</img>")


def picture(value: Any, pictures: MutableMapping[str, bytes]) -> str:
    """Return the path that stands for a picture; bytes that come with the record go into ``pictures`` under it.

    Raises:
        BrokenError: It names no picture.
    """
    if isinstance(value, dict):
        given = [key for key in _KEYS if is_given(value.get(key))]
        if not given:
            raise BrokenError("bad record", f"a picture has none of {', '.join(_KEYS)}")
        inner = value[given[0]]
        if given[0] in ("bytes", "base64") and isinstance(inner, str) and not inner.startswith("data:"):
            return inner if inner in pictures else _kept(_decoded(inner), pictures)
        return picture(inner, pictures)
    if not isinstance(value, str) or not value.strip():
        raise BrokenError("bad record", f"a picture must be a path or a URL, not {type(value).__name__}")
    text = value.strip()
    if text[:5].lower() == "data:":
        return _kept(_of_data_url(text), pictures)
    if text[:7].lower() == "file://":
        return unquote(text[7:].removeprefix("localhost"))
    return text


def settled(record: Any, bases: Sequence[str], pictures: MutableMapping[str, bytes]) -> Any:
    """Return a record in Qwen-VL's form whose pictures are paths from the image directory.

    Args:
        record: The record; what is no such record is returned as it is.
        bases: Names of the image directory: absolute paths and URLs below one of them start from there.
        pictures: Gets what ``data:`` URLs hold.

    Raises:
        BrokenError: A ``data:`` URL is broken.
    """

    def replaced(found: re.Match[str]) -> str:
        return f"<img>{below(picture(found[1], pictures), bases)}</img>"

    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list):
        return record
    return record | {
        "conversations": [
            turn | {"value": _NOT_RELATIVE.sub(replaced, turn["value"])}
            if isinstance(turn, dict) and isinstance(turn.get("value"), str)
            else turn
            for turn in turns
        ]
    }


def below(path: str, bases: Sequence[str]) -> str:
    """Return a path from the image directory, where it lies in it by one of its names; else as it is."""
    for base in bases:
        if path.startswith(f"{base.rstrip('/')}/"):
            return path[len(base.rstrip("/")) :].lstrip("/")
    return path


def _kept(data: bytes, pictures: MutableMapping[str, bytes]) -> str:
    name = f"inline-{hashlib.sha256(data).hexdigest()[:24]}"
    pictures[name] = data
    return name


def _of_data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise BrokenError("bad record", "a data: URL of a picture has no comma before its data")
    return _decoded(unquote(body)) if head.lower().endswith(";base64") else unquote_to_bytes(body)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise BrokenError("bad record", "a picture's base64 is broken") from None
