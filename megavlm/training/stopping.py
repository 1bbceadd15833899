"""Leaving a run in time: SIGTERM and SIGUSR1 finish the step, publish a checkpoint and end with exit code 75.

Slurm sends SIGUSR1 where a job asks for it (``--signal=USR1@300``), schedulers and torchrun SIGTERM. A run that is
started again goes on from there. More signals on the way change nothing.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType

logger = logging.getLogger(__name__)

STOPPED = 75
"""Exit code of a run that was asked to stop and can go on (EX_TEMPFAIL of sysexits.h)."""
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.signal: str | None = None
        """The first signal that asked, by name."""

    def _take(self, number: int, _frame: FrameType | None) -> None:
        # Nothing else in a signal handler: the loop reads the flag between two steps.
        if self.signal is None:
            self.signal = signal.Signals(number).name

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM and SIGUSR1 inside the block."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._take) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
