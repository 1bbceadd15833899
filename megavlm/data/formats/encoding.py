"""Text files that others wrote: their encoding is found once, for the whole file, and never guessed line by line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from megavlm.config.errors import UserError

UTF_8 = "utf-8-sig"
"""UTF-8, with or without a byte order mark."""
_MARK = "\ufeff"
_MARKS = (
    (codecs.BOM_UTF8, UTF_8),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark is its beginning
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_REMEDY = "convert it, for instance with iconv -f LATIN1 -t UTF-8"


class NotUnicodeError(UserError):
    """A line that is no text in the file's encoding."""


def encoding_of(path: Path) -> str:
    """Return a text file's encoding: by its byte order mark, or UTF-16 and UTF-32 by the zeros of JSON's first signs.

    Everything else is taken for UTF-8, and is an error where it is not. So is what can be read only once, a pipe: its
    beginning would be gone.
    """
    if path.exists() and not path.is_file():
        return UTF_8
    with path.open("rb") as file:
        start = file.read(4)
    for mark, name in _MARKS:
        if start.startswith(mark):
            return name
    found = json.detect_encoding(start) if len(start) == 4 and any(start) else "utf-8"
    return UTF_8 if found.startswith("utf-8") else found


def open_text(path: Path) -> TextIO:
    """Open a text file in its encoding, with its line ends as they are; reading raises ``UnicodeDecodeError``."""
    return path.open(encoding=encoding_of(path), newline="")


def not_unicode(path: Path) -> ValueError:
    """Return what is told of a file that :func:`open_text` could not decode."""
    name = encoding_of(path).removesuffix("-sig").upper()
    return UserError(f"{path} is not {name} text; {_REMEDY}")


def lines(path: Path) -> Iterator[tuple[int, str | NotUnicodeError]]:
    """Yield the lines of a file that are not empty, with their numbers from 1.

    Raises:
        UserError: Text of 16 or 32 bits that is damaged, so that lines cannot be told from each other.
    """
    encoding = encoding_of(path)
    if encoding == UTF_8:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _decoded(number, line)
        return
    try:
        # newline="\n": the only line end that JSON lines have; text may hold others.
        with path.open(encoding=encoding, newline="\n") as text:
            for number, found in enumerate(text, 1):
                if found.strip():
                    yield number, found
    except UnicodeDecodeError:
        raise not_unicode(path) from None


def _decoded(number: int, line: bytes) -> str | NotUnicodeError:
    try:
        return line.decode().removeprefix(_MARK)  # files that were put together have marks inside
    except UnicodeDecodeError as error:
        return NotUnicodeError(f"line {number} is not UTF-8 text ({error.reason} at byte {error.start}); {_REMEDY}")
