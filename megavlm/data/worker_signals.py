"""Reader processes: what they inherit, and the signals that ask a run to stop.

A fork has its parent's objects and none of its threads. An object with threads of its own (a process group of gloo, a
pipeline of DALI) waits for them when it is destroyed: in the worker for ever, or with a crash, as other threads have
their place there. So garbage is destroyed before the fork, and what is inherited is never collected.

Slurm sends SIGTERM and SIGUSR1 to every process of a job, and so to reader processes, which would die of them and
take the run along before it could save. They leave that to the process that reads from them, and end when it ends: a
worker that waits to hand on a pack would else wait for ever, and nothing but SIGKILL would reach it.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable

from megavlm.parallel.processes import end_with_parent

_STOP = {signal.SIGTERM, signal.SIGUSR1}


class StopsWithParent:
    """A ``worker_init_fn`` of a DataLoader: SIGTERM ends the worker if the parent sends it; others' signals do not.

    The worker also ends, within a second, when the parent does: the process that made this object. It never destroys
    inherited objects that only lie in circles.

    Args:
        then: the ``worker_init_fn`` that it takes the place of; called first.
    """

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self._then = then
        self._parent = os.getpid()

    def __call__(self, worker_id: int) -> None:
        """Prepare worker ``worker_id``, in its main thread and before it has others, which inherit its mask."""
        gc.freeze()
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)
        end_with_parent(self._parent)
        threading.Thread(target=_listen, args=(self._parent,), daemon=True).start()
        if self._then is not None:
            self._then(worker_id)


def _listen(parent: int) -> None:
    while True:
        # Blocked signals are waited for, as only this tells who sent one.
        sent = signal.sigwaitinfo(_STOP)
        if sent.si_signo == signal.SIGTERM and sent.si_pid == parent:
            os._exit(0)
