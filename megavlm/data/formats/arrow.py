"""A data set that Hugging Face's ``datasets`` saved: a directory of Arrow streams, with ``state.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megavlm.config.errors import UserError
from megavlm.data.formats.base import is_inside
from megavlm.data.formats.parquet import Row, need_pyarrow, take_pictures, unreadable

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_ROWS = 16


def saved_files(path: Path) -> list[Path]:
    """Return the files of a saved data set in their order; none for another directory.

    Raises:
        UserError: It holds several splits, or is damaged.
    """
    if (path / _SPLITS).is_file():
        names = _json(path / _SPLITS).get("splits")
        splits = ", ".join(map(str, names)) if isinstance(names, list) else "several splits"
        raise UserError(f"{path} holds {splits}; give the folder of one of them")
    if not (path / _STATE).is_file():
        return []
    state = _json(path / _STATE)
    files = state.get("_data_files")
    names = [one.get("filename") for one in files if isinstance(one, dict)] if isinstance(files, list) else []
    if not names or not all(isinstance(name, str) and is_inside(name) for name in names):
        raise UserError(f"{path / _STATE} names no data files; save the data set again with save_to_disk")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise UserError(f"{path}: rows are chosen by a file of indices; call flatten_indices() and save it again")
    return [path / name for name in names]


def read_rows(path: Path) -> Iterator[tuple[Row, dict[str, bytes]]]:
    """Yield each row of a file, and the bytes of its pictures by the names that stand for them.

    Raises:
        UserError: It is no Arrow file, or pyarrow is not installed.
    """
    pyarrow = need_pyarrow(path)
    number = 0
    try:
        with pyarrow.memory_map(str(path)) as file, _reader(pyarrow, file) as batches:
            for batch in batches:
                for start in range(0, batch.num_rows, _ROWS):
                    for row in batch.slice(start, _ROWS).to_pylist():
                        yield take_pictures(row, f"{path.name}/{number}")
                        number += 1
    except Exception as error:
        raise unreadable(path, error, number, "Arrow") from None


def _reader(pyarrow: Any, file: Any) -> Any:
    import pyarrow.ipc as ipc  # noqa: PLC0415 - an extra

    return ipc.open_stream(file)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    return content if isinstance(content, dict) else {}
