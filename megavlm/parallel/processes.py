"""Who a process is, whether it still lives, and children that do not outlive their parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
_DEAD_STATES = frozenset("ZXx")  # of proc(5): ended, whether or not its parent has looked yet
_START_FIELD = 19  # of /proc/PID/stat, after the name: clock ticks from the machine's start to the process's
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Process:
    """What tells one process from all others, on all machines and for ever: numbers alone are used again."""

    host: str
    """Name of the machine, or of the container; several may have the same."""
    boot: str
    """The kernel's own name of this start of the machine; empty where it has none."""
    namespace: int
    """Which container's process numbers ``pid`` is one of."""
    pid: int
    start: int
    """Clock ticks from the machine's start to the process's; 0 where that is not known."""


def this_process() -> Process:
    """Return who we are."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        boot, namespace = "", 0
    return Process(socket.gethostname(), boot, namespace, os.getpid(), _state_and_start(os.getpid())[1])


def is_running(process: Process) -> bool | None:
    """Whether ``process`` lives; None where that cannot be seen from here: another machine, another container."""
    here = this_process()
    # Without a name of this start of the machine, equal host names prove nothing.
    if not here.boot or (process.boot, process.namespace) != (here.boot, here.namespace):
        return None
    try:
        os.kill(process.pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    state, start = _state_and_start(process.pid)
    return state not in _DEAD_STATES and (0 in (start, process.start) or start == process.start)


def _state_and_start(pid: int) -> tuple[str, int]:
    """Return the letter of a process's state and when it started; blank and 0 where that is not to be seen."""
    try:
        # The name comes in brackets and may hold anything, brackets too.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[_START_FIELD])
    except (OSError, IndexError, ValueError):
        return "", 0


def end_with_parent(parent: int) -> None:
    """End this process within a second of the end of ``parent``, however that ended and whatever this one does.

    By the kernel's own signal where it is right (it is sent when the *thread* that forked ends, so only where that was
    the main thread), which reaches a process that computes for minutes; and by a thread that watches the parent.

    Args:
        parent: the process that made this one.
    """
    _ask_for_signal()
    threading.Thread(target=_watch, args=(parent,), name="megavlm-parent", daemon=True).start()


def signalled_at_parents_end(number: int) -> Callable[[], None]:
    """Return a ``preexec_fn`` for :class:`subprocess.Popen`: the program gets a signal when our main thread ends."""

    def ask() -> None:
        if _libc is not None and hasattr(_libc, "prctl"):
            _libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)

    return ask


def children_end_with_us() -> None:
    """Let every process that the main thread forks from now on end with this one; several calls are like one."""
    global _hooked
    if not _hooked:
        _hooked = True
        os.register_at_fork(after_in_child=_in_child)


_hooked = False
try:
    _libc: ctypes.CDLL | None = ctypes.CDLL(None)
except OSError:
    _libc = None


def _in_child() -> None:
    _ask_for_signal()


def _ask_for_signal() -> None:
    """Ask for SIGKILL at the parent's end, if it was its main thread that forked us."""
    # After a fork, Python's current thread is the object that it was in the parent.
    if _libc is not None and hasattr(_libc, "prctl") and isinstance(threading.current_thread(), threading._MainThread):  # type: ignore[attr-defined]
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _watch(parent: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # no such process any more, or a kernel before 5.3
        handle = os.pidfd_open(parent)
        if os.getppid() == parent:  # else it is another's number by now
            waiting = select.poll()
            waiting.register(handle, select.POLLIN)
            while not waiting.poll():
                pass
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
