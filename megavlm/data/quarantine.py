"""The list of samples that a run left out: one line each, over epochs and restarts."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from megavlm.data.batch import SkippedSample

logger = logging.getLogger(__name__)


class Quarantine:
    """``quarantine-<data-parallel rank>.jsonl`` in a run's directory.

    A run that goes on from a checkpoint reads some samples again, and one with other ranks those of another list:
    what is in any list is not written again.

    Args:
        directory: the run's.
        rank: data-parallel rank.
    """

    def __init__(self, directory: Path, rank: int) -> None:
        self.path = directory / f"quarantine-{rank}.jsonl"
        directory.mkdir(parents=True, exist_ok=True)
        _drop_cut_line(self.path)
        self._listed = {sample for path in sorted(directory.glob("quarantine-*.jsonl")) for sample in read_list(path)}
        self._file: TextIO | None = None

    def add(self, samples: Iterable[SkippedSample]) -> None:
        """List samples that are not listed yet; what goes wrong with the file only costs a warning."""
        fresh = [sample for sample in dict.fromkeys(samples) if sample not in self._listed]
        if not fresh:
            return
        self._listed.update(fresh)
        try:
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8")
            self._file.writelines(json.dumps(sample._asdict()) + "\n" for sample in fresh)
            self._file.flush()
        except OSError as error:
            logger.warning("%d samples left out are not in %s: %s", len(fresh), self.path, error)

    def close(self) -> None:
        """Close the file; may be called again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_list(path: Path) -> Iterator[SkippedSample]:
    """Read the samples of a list; lines that a kill cut off are left out."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            yield SkippedSample(**json.loads(line))
        except (ValueError, TypeError):
            continue


def _drop_cut_line(path: Path) -> None:
    data = path.read_bytes() if path.is_file() else b""
    if data and not data.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
