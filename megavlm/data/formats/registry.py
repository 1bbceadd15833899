"""Names of the published formats that ``megavlm prepare`` reads, and the module that reads each.

A format is one module with two functions::

    def matches(source: Source) -> bool: ...            # whether the input looks like this format
    def read(source: Source) -> Iterator[Record | Broken]: ...   # Qwen-VL records, and what cannot become one
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, cast

from megavlm.config.errors import UserError
from megavlm.data.formats.base import Broken, Record
from megavlm.data.formats.source import Source


class FormatModule(Protocol):
    """What a format's module has."""

    def matches(self, source: Source) -> bool:
        """Whether the input looks like this format."""
        ...

    def read(self, source: Source) -> Iterator[Record | Broken]:
        """Yield the records in Qwen-VL's form, in file order, and a :class:`Broken` for each that cannot be one."""
        ...


@dataclass(frozen=True)
class Format:
    """A format's name, what it is, and which options of ``megavlm prepare`` it takes."""

    name: str
    module: str
    summary: str
    options: tuple[str, ...] = ()

    def load(self) -> FormatModule:
        """Import the format's module."""
        return cast(FormatModule, importlib.import_module(self.module))


_FORMATS: dict[str, Format] = {}


def register(name: str, module: str, summary: str, options: tuple[str, ...] = ()) -> None:
    """Add a format.

    Args:
        name: What ``--format`` calls it.
        module: Module with ``matches`` and ``read``, imported when it is needed.
        summary: One line for the help.
        options: Fields of :class:`Source` beyond path and images that it reads; given to another format, they are
            an error.

    Raises:
        UserError: The name is taken.
    """
    if name in _FORMATS:
        raise UserError(f"data format {name!r} is registered twice")
    _FORMATS[name] = Format(name, module, summary, options)


def formats() -> tuple[Format, ...]:
    """Return the registered formats, in order of registration."""
    return tuple(_FORMATS.values())


def choose(source: Source, name: str | None) -> Format:
    """Return the format called ``name``; for None, the only one that the input looks like.

    Raises:
        MissingFileError: The input is missing.
        UserError: There is no such format, or not exactly one fits.
    """
    if name is not None:
        if name not in _FORMATS:
            raise UserError(f"--format {name}: no such format; there are {', '.join(_FORMATS)}")
        return _FORMATS[name]
    fitting = [entry for entry in _FORMATS.values() if entry.load().matches(source)]
    if len(fitting) == 1:
        return fitting[0]
    names = [entry.name for entry in fitting]
    if names:
        raise UserError(f"{source.path} could be {' or '.join(names)}; say which with --format")
    if source.is_folder:
        raise UserError(
            f"{source.path} is a folder, and not one of CodeFuse's with records per task; give the file, or the folder "
            "that itself has the parquet or tar files"
        )
    raise UserError(f"{source.path} looks like none of {', '.join(_FORMATS)}; say which it is with --format")
