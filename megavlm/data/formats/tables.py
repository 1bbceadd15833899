"""Files of rows: parquet, Arrow as ``datasets`` saves it, tars of records; one, or a directory of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megavlm.config.errors import UserError
from megavlm.data.formats import arrow, parquet, tars


def files_of(path: Path) -> list[Path]:
    """Return a file of rows, or those of a directory in order; none for anything else.

    Raises:
        UserError: The directory holds files of two kinds, or several splits.
    """
    if not path.is_dir():
        return [path] if path.suffix in (".parquet", ".arrow") or tars.is_tar(path) else []
    saved = arrow.saved_files(path)
    if saved:
        return saved
    tables = parquet.files_of(path)
    packed = sorted(file for file in path.iterdir() if tars.is_tar(file) and file.is_file() and file.name[0] != ".")
    if tables and packed:
        raise UserError(f"{path} holds parquet files and tar files; give a folder of one kind")
    return tables or packed


def read_rows(path: Path) -> Iterator[tuple[Any, Mapping[str, bytes]]]:
    """Yield each row of a file, and its pictures by the names that stand for them.

    Raises:
        UserError: The file cannot be read.
    """
    module = tars if tars.is_tar(path) else arrow if path.suffix == ".arrow" else parquet
    yield from module.read_rows(path)
