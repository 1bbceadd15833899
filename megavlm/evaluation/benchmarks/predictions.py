"""Predictions on disk: JSON lines, appended while they come, so that an evaluation that ends early goes on later.

Each replica appends to ``predictions.part-R.jsonl``; the last step puts them together in ``predictions.jsonl``,
in the benchmark's order, and removes the parts. Every line names its run: benchmark, checkpoint and questions.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from megavlm.checkpoint.manifest import replace_text
from megavlm.config.errors import UserError

logger = logging.getLogger(__name__)

PREDICTIONS, IDENTITY = "predictions.jsonl", "run-identity.json"
_PARTS = "predictions.part-*.jsonl"

Row = dict[str, Any]
"""``run``, ``id``, ``prediction``; ``losses`` of a closed question's options; ``problem`` where it was not asked."""


def read_predictions(folder: Path, run: str, identity: Mapping[str, Any]) -> dict[str, Row]:
    """Return what was predicted before, by question; a line that was cut short at the end of a file is left out.

    So is a question that could not be asked: its picture may have been mended since.

    Args:
        folder: the output directory; it need not exist.
        run: name of this run.
        identity: what the name stands for.

    Raises:
        UserError: a file is of another run, or damaged elsewhere than at its end.
    """
    _check_identity(folder, run, identity)
    found: dict[str, Row] = {}
    for path in [folder / PREDICTIONS, *sorted(folder.glob(_PARTS))]:
        if path.is_file():
            for row in _rows(path, run):
                if not row.get("problem"):
                    found.setdefault(row["id"], row)
    return found


def _check_identity(folder: Path, run: str, identity: Mapping[str, Any]) -> None:
    """Say in words in what an earlier run in the same directory differs."""
    path = folder / IDENTITY
    if not path.is_file():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return  # cut short as it was written; the lines have the run's name too
    if before.get("run") != run:
        differ = [f"{key} {before.get(key)} instead of {value}" for key, value in identity.items()
                  if before.get(key) != value]  # fmt: skip
        raise UserError(f"{folder}: has predictions of another run ({'; '.join(differ)}); give another --out")


def _rows(path: Path, run: str) -> list[Row]:
    """The whole lines of a file."""
    whole, torn = _split(path.read_bytes())
    if torn:
        logger.warning("%s was cut short; it goes on after line %d", path, len(whole))
    rows = []
    for number, line in enumerate(whole, 1):
        try:
            row = json.loads(line)
            known = isinstance(row["id"], str) and isinstance(row["prediction"], str)
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise UserError(f"{path}: line {number} is no prediction; delete the line, and it will be made again")
        if row.get("run") != run:
            raise UserError(f"{path}: line {number} is of run {row.get('run')}, not of {run}; give another --out")
        rows.append(row)
    return rows


def _split(data: bytes) -> tuple[list[bytes], int]:
    """The whole lines of a file, and the length of what comes after the last of them."""
    end = data.rfind(b"\n") + 1
    return data[:end].split(b"\n")[:-1], len(data) - end


class PartWriter:
    """Appends one replica's predictions.

    Args:
        folder: the output directory.
        replica: data-parallel rank.
        run: name of the run.
    """

    def __init__(self, folder: Path, replica: int, run: str) -> None:
        self.path, self.run = folder / f"predictions.part-{replica}.jsonl", run
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            torn = _split(self.path.read_bytes())[1]
            if torn:
                os.truncate(self.path, self.path.stat().st_size - torn)
        self._file: IO[str] = self.path.open("a", encoding="utf-8")

    def append(self, rows: Iterable[Row]) -> None:
        """Write rows to disk."""
        for row in rows:
            self._file.write(json.dumps({"run": self.run, **row}, ensure_ascii=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def write_identity(folder: Path, run: str, identity: Mapping[str, Any]) -> None:
    """Write what the run's name stands for."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / IDENTITY, json.dumps({"run": run, **identity}, indent=2) + "\n")


def put_together(folder: Path, rows: Sequence[Row]) -> None:
    """Write ``predictions.jsonl`` and remove the parts."""
    replace_text(folder / PREDICTIONS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for path in folder.glob(_PARTS):
        path.unlink()
