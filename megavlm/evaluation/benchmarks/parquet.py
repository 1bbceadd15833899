"""Rows of Hugging Face's parquet files; the pictures in them are read when they are asked for."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from megavlm.config.errors import UserError
from megavlm.data.formats.parquet import files_of, need_pyarrow, unreadable
from megavlm.evaluation.benchmarks.spec import BenchmarkFiles, StoredPicture

logger = logging.getLogger(__name__)

_SHARD = re.compile(r"(?P<split>.+?)-\d+-of-\d+.*\.parquet$")
_COLUMNS_AT_ONCE = 8  # MMMU's rows have seven columns of pictures


def is_parquet(path: Path) -> bool:
    """Whether a path is a parquet file, or a folder that has some in it or in its folders (MMMU: one per subject)."""
    return path.suffix == ".parquet" or (path.is_dir() and bool(_inside(path)))


def _inside(folder: Path) -> list[Path]:
    folders = (folder, *sorted(one for one in folder.iterdir() if one.is_dir() and not one.name.startswith(".")))
    return [file for one in folders for file in files_of(one)]


def read_rows(source: BenchmarkFiles) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows of a parquet file, or of a folder's files, each with a name for errors.

    A picture is a :class:`StoredPicture` or None, several are a list. Of a folder with several splits
    (``test-00000-of-00003.parquet``), ``--split`` says which.

    Raises:
        MissingFileError: there is no such file.
        UserError: pyarrow is missing, a file is no parquet, or the split is not clear.
    """
    files = _files(source)
    names = ["" if path == source.data else f"{path.relative_to(source.data)} " for path in files]
    return [
        (f"{name}row {row}", cells)
        for name, path in zip(names, files, strict=True)
        for row, cells in enumerate(_rows(path))
    ]


def _files(source: BenchmarkFiles) -> list[Path]:
    """The files to read, in the order of their names."""
    if source.data.is_file():
        return [source.data]
    files = _inside(source.data)
    splits = {path: match["split"] for path in files if (match := _SHARD.match(path.name))}
    names = sorted(set(splits.values()))
    if source.split is None and len(names) > 1:
        raise UserError(f"{source.data} has the splits {', '.join(names)}; say which with --split NAME")
    if source.split is not None and source.split not in names:
        raise UserError(f"--split {source.split}: {source.data} has {', '.join(names) or 'no splits'}")
    return [path for path in files if source.split is None or splits.get(path) == source.split]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, without the bytes of its pictures."""
    pyarrow = need_pyarrow(path)
    row_count = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            # A picture is a group of two columns, "image.bytes" and "image.path".
            names = [file.schema.column(index).path for index in range(len(file.schema))]
            pictures = {name.split(".")[0] for name in names if name.endswith(".bytes")}
            light = [name for name in names if not name.endswith(".bytes")]
            for group in range(file.num_row_groups):
                for index, row in enumerate(file.read_row_group(group, columns=light).to_pylist()):
                    shown = {column: _pictures(path, group, index, column, row.get(column)) for column in pictures}
                    yield {**row, **shown}
                    row_count += 1
    except Exception as error:  # pyarrow's own, and what Python makes of dates, decimals and text that are none
        raise unreadable(path, error, row_count) from None


def _pictures(path: Path, group: int, index: int, column: str, cell: Any) -> Any:
    """A cell's picture, its list of pictures, or None."""
    if isinstance(cell, list):
        return [_stored(path, group, index, column, place) for place in range(len(cell))]
    return None if cell is None else _stored(path, group, index, column, None)


def _stored(path: Path, group: int, index: int, column: str, place: int | None) -> StoredPicture:
    def read() -> bytes:
        try:
            cell = _cells(path, group, column)[index].as_py()
        except Exception as error:
            logger.warning("%s", unreadable(path, error, index))
            return b""  # no picture: the question counts as wrong
        return (cell if place is None else cell[place])["bytes"] or b""

    where = f"{path.parent.name}/{path.name}:{group}:{index}:{column}"
    return StoredPicture(where if place is None else f"{where}:{place}", read)


@lru_cache(_COLUMNS_AT_ONCE)
def _cells(path: Path, group: int, column: str) -> Any:
    """A column of a row group; it is kept, for the next questions mostly want the same."""
    with need_pyarrow(path).parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column]).column(column)
