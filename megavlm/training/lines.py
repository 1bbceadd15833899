"""A run's files of JSON lines, one for each step: what is left of them when a run goes on from an earlier step."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from megavlm.checkpoint.manifest import sync_directory

logger = logging.getLogger(__name__)


def undone(path: Path) -> Path:
    """Return where the lines of steps go that were lost with a crash: ``metrics.undone.jsonl``."""
    return path.with_suffix(".undone" + path.suffix)


def drop_steps_after(path: Path, step: int) -> None:
    """Move the lines of the steps after ``step`` to :func:`undone`, so that each step is in the file once.

    The file is replaced as a whole: a crash leaves it as it was, or as it is to be. A line that a crash cut off goes;
    where there is nothing to drop, nothing is written.

    Args:
        path: a file of JSON objects with the key ``step``, one on each line; need not exist.
        step: the last one that counts.

    Raises:
        OSError: the disk is full, say; the file is as it was.
    """
    path = path.resolve()
    if not path.is_file():
        return
    kept, dropped, data = [], [], path.read_bytes()
    for line in data.splitlines(keepends=True):
        at = _step(line)
        if at is not None and at <= step:
            kept.append(line)
        elif at is not None:
            dropped.append(line)
    text = b"".join(kept)
    if text == data:
        return
    if dropped:
        with undone(path).open("ab") as file:
            file.writelines(dropped)
            file.flush()
            os.fsync(file.fileno())
    beside = path.with_name(path.name + ".new")
    with beside.open("wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync_directory(path.parent)
    logger.info("%s: %d lines of steps after %d are in %s now", path.name, len(dropped), step, undone(path).name)


def _step(line: bytes) -> int | None:
    """Return the step of a line; None where it is cut off or broken."""
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
        return int(found["step"]) if isinstance(found, dict) else None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
