"""Named fault points, so that tests of failures are exact instead of lucky. Off unless an environment variable asks.

``MEGAVLM_FAULT=checkpoint.before_publish:rank1:step4:kill`` makes rank 1 kill itself when it passes that point in step
4. Several are separated by commas. ``rank`` and ``step`` may be left out: any rank, any step. Each but ``slow`` fires
once in a process; with ``MEGAVLM_FAULT_ONCE=DIR`` once over all restarts of a job, by a file in that directory.

Actions: ``kill`` (SIGKILL), ``term`` (SIGTERM), ``usr1`` (SIGUSR1), ``stop`` (SIGSTOP), ``exit`` (leaves with code 1),
``raise`` (RuntimeError), ``full`` (OSError: no space left), ``hang`` (sleeps for an hour), ``slow`` (sleeps for 50 ms,
each time: a slow machine), ``nan`` or ``inf`` where the point is a value, and ``flip`` (a bit of a file) before the
file is read back.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from megavlm.config.errors import UserError

logger = logging.getLogger(__name__)

VARIABLE = "MEGAVLM_FAULT"
ONCE = "MEGAVLM_FAULT_ONCE"
POINTS = frozenset(
    {
        "checkpoint.after_shards",
        "checkpoint.before_manifest",
        "checkpoint.before_publish",
        "checkpoint.before_pointer",
        "checkpoint.before_retention",
        "checkpoint.in_shard",
        "checkpoint.in_small_files",
        "checkpoint.start",
        "conversion.before_read_back",
        "evaluation.round",
        "gradient.value",
        "loss.value",
        "step.begin",
        "step.end",
        "step.forward",
        "step.in_collective",
        "vision.backward",
        "vision.encode",
    }
)
"""Every point there is."""
_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "usr1": signal.SIGUSR1, "stop": signal.SIGSTOP}
_VALUES = frozenset({"nan", "inf"})
_FLIP, _BEFORE_READ = "flip", frozenset({"conversion.before_read_back"})
ACTIONS = frozenset({*_SIGNALS, "exit", "raise", "full", "hang", "slow", _FLIP}) | _VALUES
_SLOW_SECONDS = 0.05


@dataclass(frozen=True)
class Fault:
    """One fault that was asked for."""

    point: str
    action: str
    rank: int | None = None
    step: int | None = None

    @property
    def name(self) -> str:
        """How files and logs call it."""
        return f"{self.point}-{self.rank}-{self.step}-{self.action}"


def parse(text: str) -> list[Fault]:
    """Return the faults that ``text`` asks for.

    Raises:
        UserError: an unknown point, action or condition, or an action that does not fit the point: a fault that never
            fires would make a test that cannot fail.
    """
    faults = []
    for item in filter(None, text.split(",")):
        words = item.split(":")
        point, middle, action = words[0], words[1:-1], words[-1]
        if point not in POINTS or action not in ACTIONS:
            raise UserError(f"{VARIABLE}: {item!r} names no fault; points: {', '.join(sorted(POINTS))}")
        if (action in _VALUES) != point.endswith(".value"):
            raise UserError(
                f"{VARIABLE}: {item!r}: {point} cannot {action}; nan and inf belong to values, and to them only"
            )
        if (action == _FLIP) != (point in _BEFORE_READ):
            raise UserError(f"{VARIABLE}: {item!r}: {point} cannot {action}; flip belongs to what is read back")
        conditions = [re.fullmatch(r"(rank|step)(\d+)", word) for word in middle]
        where = {match[1]: int(match[2]) for match in conditions if match}
        if len(where) != len(middle):
            raise UserError(f"{VARIABLE}: {item!r}: between point and action stand rankN and stepN, each at most once")
        faults.append(Fault(point, action, where.get("rank"), where.get("step")))
    return faults


_faults: list[Fault] | None = None
_fired: set[Fault] = set()
_step = 0


def at_step(step: int) -> None:
    """Say which step is being taken."""
    global _step
    _step = step


def fault(point: str) -> None:
    """Pass a fault point: nothing happens unless it was asked for."""
    one = _due(point)
    if one is not None:
        _act(one)


def spoilt(point: str, value: float) -> float:
    """Return ``value``, or NaN or infinity (the actions ``nan`` and ``inf``) where that was asked for."""
    one = _due(point)
    return value if one is None else float(one.action)


def flipped(point: str) -> bool:
    """Whether a bit is to be changed here (the action ``flip``)."""
    return _due(point) is not None


def _due(point: str) -> Fault | None:
    global _faults
    if _faults is None:
        _faults = parse(os.environ.get(VARIABLE, ""))
    assert point in POINTS, point
    for one in _faults:
        here = one.rank in (None, int(os.environ.get("RANK", "0"))) and one.step in (None, _step)
        if one.point == point and here and one.action == "slow":
            return one
        if one.point == point and here and one not in _fired and _first_time(one):
            _fired.add(one)
            logger.warning("fault: %s", one.name)
            return one
    return None


def _first_time(one: Fault) -> bool:
    directory = os.environ.get(ONCE)
    if directory is None:
        return True
    try:
        (Path(directory) / f"{one.name}-{os.environ.get('RANK', '0')}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _act(one: Fault) -> None:
    if one.action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[one.action])
        return
    if one.action == "exit":
        logging.shutdown()
        sys.stderr.flush()
        os._exit(1)
    if one.action == "hang":
        time.sleep(3600)
    if one.action == "slow":
        time.sleep(_SLOW_SECONDS)
        return
    if one.action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    raise RuntimeError(f"fault at {one.point}")
