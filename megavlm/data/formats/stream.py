"""JSON files read piece by piece: a file of a million records needs memory for one of them.

Python's own decoder reads the pieces; what is added here is only where a piece of a list or an object ends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from megavlm.config.errors import UserError
from megavlm.data.formats.encoding import not_unicode, open_text

_PIECE = 1 << 20
"""Characters that are read at once."""
_LONGEST = 1 << 28
"""Characters of the longest record that is taken for one."""
_TAIL = 16
"""An error this near to the end of what was read may come from a value that was cut there."""
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def kind(path: Path) -> str:
    """Return ``[`` for a file with a list, ``{`` for one with an object.

    Raises:
        UserError: It is neither, or not JSON at all.
    """
    with open_text(path) as file:
        found = _Scanner(file, path).peek()
    if found not in ("[", "{"):
        raise UserError(f"{path} is not valid JSON: it must begin with [ or {{")
    return found


def elements(path: Path, key: str | None = None) -> Iterator[Any]:
    """Yield the elements of the list that the file holds; with ``key``, of the list that its object has there.

    Raises:
        UserError: The file is not JSON; the message names the record and its line.
    """
    with open_text(path) as file:
        scanner = _Scanner(file, path)
        if key is None:
            yield from scanner.elements()
        else:
            for name in scanner.names():
                if name == key and scanner.peek() == "[":
                    yield from scanner.elements()
                else:
                    scanner.skip()
        scanner.end()


def members(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of the object that the file holds, each value whole.

    Raises:
        UserError: As of :func:`elements`.
    """
    with open_text(path) as file:
        scanner = _Scanner(file, path)
        for name in scanner.names():
            yield name, scanner.value()
        scanner.end()


def outline(path: Path, most: int = 16) -> dict[str, Any]:
    """Return the first members of the object that the file holds, at most ``most``, and of lists as many elements.

    Raises:
        UserError: As of :func:`elements`.
    """
    found: dict[str, Any] = {}
    with open_text(path) as file:
        scanner = _Scanner(file, path)
        for name in scanner.names():
            if scanner.peek() == "[":
                kept: list[Any] = []
                for element in scanner.elements():
                    if len(kept) < most:
                        kept.append(element)
                found[name] = kept
            else:
                found[name] = scanner.value()
            if len(found) == most:
                break
    return found


class _Scanner:
    """A place in a JSON file."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._text = ""
        self._at = 0
        self._line = 1
        self._record: int | str | None = None

    def peek(self) -> str:
        """Return the next character that is no space, and stay in front of it; nothing at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def value(self) -> Any:
        """Read a value, whole."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                behind = error.pos - self._at
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _TAIL
                if cut and len(self._text) - self._at < _LONGEST and self._more():
                    continue
                raise self._error(error.msg.removesuffix(" at"), self._at + behind) from None
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in ..
                raise self._error(str(error), self._at) from None
            size = end - self._at
            # A number may go on in the next piece: 12 is all that was understood of "12.5e-" so far.
            if len(self._text) - end >= _TAIL or not self._more():
                self._at += size
                return value

    def elements(self) -> Iterator[Any]:
        """Yield the elements of a list."""
        self._take("[")
        if self.peek() == "]":
            self._take("]")
            return
        self._record = 0
        while True:
            yield self.value()
            if self._take(",]") == "]":
                self._record = None
                return
            self._record += 1

    def names(self) -> Iterator[str]:
        """Yield the names of an object's members; the caller reads the value before it asks for the next."""
        self._take("{")
        if self.peek() == "}":
            self._take("}")
            return
        while True:
            if self.peek() != '"':
                raise self._error("a name in double quotes is missing", self._at)
            name = self.value()
            self._take(":")
            self._record = name
            yield name
            self._record = name
            if self._take(",}") == "}":
                self._record = None
                return

    def skip(self) -> None:
        """Read a value and forget it."""
        if self.peek() == "[":
            for _ in self.elements():
                pass
        else:
            self.value()

    def end(self) -> None:
        """Check that nothing follows."""
        if self.peek():
            raise UserError(
                f"{self._path} is not valid JSON: something follows after its end, on line {self._here(self._at)}; "
                "a file with an object in each line must be called .jsonl"
            )

    def _take(self, characters: str) -> str:
        found = self.peek()
        if not found or found not in characters:
            raise self._error(f"{' or '.join(characters)} is missing", self._at)
        self._at += 1
        return found

    def _more(self) -> bool:
        """Drop what was read, and read as much again as is left of it, or a piece."""
        self._line += self._text.count("\n", 0, self._at)
        try:
            piece = self._file.read(max(_PIECE, len(self._text) - self._at))
        except UnicodeDecodeError:
            raise not_unicode(self._path) from None
        self._text = self._text[self._at :] + piece
        self._at = 0
        return bool(piece)

    def _here(self, position: int) -> int:
        return self._line + self._text.count("\n", 0, position)

    def _error(self, what: str, position: int) -> ValueError:
        where = "" if self._record is None else f"record {self._record}, "
        return UserError(
            f"{self._path} is not valid JSON: {where}line {self._here(position)}: {what}; mend it, or write the "
            "records as .jsonl, one in a line, where broken ones are skipped"
        )
