"""Rows of parquet files, whose pictures are in them: as the Hugging Face hub and CodeFuse-VLM's users have them.

A picture is a column of bytes, or of ``{"bytes", "path"}`` (the hub's ``Image``), or of a list of these; it may also
lie deeper, in the parts of a message. In the row that is yielded a name stands in its place, and its bytes are handed
out beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megavlm.config.errors import UserError
from megavlm.data.machine import is_machine_fault

_ROWS = 16
"""Rows that are held at once."""

Row = dict[str, Any]


def files_of(path: Path) -> list[Path]:
    """Return a parquet file, or those of a folder in order of their names; none for anything else."""
    if path.is_dir():
        return sorted(file for file in path.glob("*.parquet") if file.is_file() and not file.name.startswith("."))
    return [path] if path.suffix == ".parquet" else []


def need_pyarrow(path: Path) -> Any:
    """Return the module ``pyarrow``, with its ``parquet``, to read ``path``.

    Raises:
        UserError: It is not installed.
    """
    try:
        import pyarrow  # noqa: PLC0415 - an extra
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError:
        raise UserError(
            f"{path}: {'Arrow' if path.suffix == '.arrow' else 'parquet'} needs pyarrow; pip install 'megavlm[parquet]'"
        ) from None
    return pyarrow


def unreadable(path: Path, error: Exception, row: int = 0, kind: str = "parquet") -> ValueError:
    """Return what is told of a file that pyarrow could not read from ``row`` on.

    Raises:
        OSError: It is the machine's error, not the file's.
    """
    if is_machine_fault(error):
        raise error
    line = " ".join(str(error).split())
    return UserError(f"{path} cannot be read as {kind} from row {row} on: {line}; fetch it again")


def read_rows(path: Path) -> Iterator[tuple[Row, dict[str, bytes]]]:
    """Yield each row of a file, and the bytes of its pictures by the names that stand for them.

    Raises:
        UserError: It is no parquet file, or pyarrow is not installed.
    """
    pyarrow = need_pyarrow(path)
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            for batch in file.iter_batches(batch_size=_ROWS, use_threads=False):
                for row in batch.to_pylist():
                    yield take_pictures(row, f"{path.name}/{number}")
                    number += 1
    except Exception as error:  # pyarrow's own, and what Python makes of dates, decimals and text that are none
        raise unreadable(path, error, number) from None


def take_pictures(row: Row, name: str) -> tuple[Row, dict[str, bytes]]:
    """Return a row with names (``NAME/0``, ..) where its pictures were, and the pictures by these."""
    pictures: dict[str, bytes] = {}

    def replace(value: Any) -> Any:
        if isinstance(value, list):
            return [replace(each) for each in value]
        if isinstance(value, dict) and "bytes" in value:
            if value["bytes"] is None:
                return value.get("path")
            value = value["bytes"]
        if isinstance(value, dict):
            return {key: replace(each) for key, each in value.items()}
        if isinstance(value, bytes):
            place = f"{name}/{len(pictures)}"
            pictures[place] = value
            return place
        return value

    return {column: replace(value) for column, value in row.items()}, pictures
