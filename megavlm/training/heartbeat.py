"""A file per rank that says where it is: what the others, and ``megavlm doctor``, look at when a run stands still."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

from megavlm.parallel.lock import LockView

logger = logging.getLogger(__name__)

FOLDER = "heartbeats"
_EVERY_SECONDS = 1.0


class Heartbeat:
    """Writes ``heartbeats/rank-N.json`` in the run's directory, at most once a second.

    Args:
        directory: the run's.
        rank: of this process.
        world_size: of the run; rank 0 removes the files of ranks that an earlier start had beyond it.
        lock: of the directory; nothing is written once it is lost.
    """

    def __init__(self, directory: Path, rank: int, world_size: int, lock: LockView | None = None) -> None:
        self._lock = lock
        self.path = directory / FOLDER / f"rank-{rank}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            for facts in read_heartbeats(directory):
                if facts["rank"] >= world_size:
                    (directory / FOLDER / f"rank-{facts['rank']}.json").unlink(missing_ok=True)
        self.waited_seconds = 0.0
        """Time spent waiting for the other ranks at the end of steps: the slowest rank has the least."""
        self._facts: dict[str, Any] = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()}
        self._written = 0.0

    def beat(self, step: int, phase: str, *, now: bool = False) -> None:
        """Say that this rank is in ``phase`` of ``step``; ``now`` writes even if it has just been written."""
        clock = time.monotonic()
        if (not now and clock - self._written < _EVERY_SECONDS) or (self._lock is not None and self._lock.lost()):
            return
        self._written = clock
        facts = {"step": step, "phase": phase, "time": time.time(), "waited_seconds": round(self.waited_seconds, 3)}
        beside = self.path.with_suffix(".new")
        try:
            beside.write_text(json.dumps(self._facts | facts), encoding="utf-8")
            beside.replace(self.path)
        except OSError as error:  # a full disk must not end a run that only wanted to say that it is well
            logger.warning("%s cannot be written: %s", self.path, error)


def read_heartbeats(directory: Path) -> list[dict[str, Any]]:
    """Return what each rank last said, by rank; broken files are left out."""
    found = []
    for path in (directory / FOLDER).glob("rank-*.json"):
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            found.append(
                {**facts, "rank": int(facts["rank"]), "step": int(facts["step"]), "time": float(facts["time"])}
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(found, key=lambda facts: facts["rank"])


def blame(directory: Path, rank: int, step: int) -> str | None:
    """Return a line that names the ranks that the others lost; None where another rank says it.

    Call it after this rank has said that it failed, and the others have had the time to.

    Args:
        directory: the run's.
        rank: the one that asks.
        step: where it is.
    """
    others = [facts for facts in read_heartbeats(directory) if facts["rank"] != rank]
    if any(facts["rank"] < rank and facts.get("phase") == "failed" for facts in others):
        return None
    lost = [facts for facts in others if facts.get("phase") not in ("failed", "done", "stopped")]
    if not lost:
        return f"step {step}: a collective broke, and every rank noticed"
    names = ", ".join(
        f"rank {facts['rank']} (host {facts.get('host')}, pid {facts.get('pid')}), last seen in step {facts['step']} "
        f"{time.time() - facts['time']:.0f} s ago"
        for facts in lost
    )
    return f"step {step}: lost {names}; it was killed, crashed or hangs: see its own log"
