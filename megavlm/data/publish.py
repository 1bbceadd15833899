"""A directory that is seen whole or not at all, whenever the process that writes it is stopped."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Give a directory beside ``out`` to write into; it replaces ``out`` if nothing is raised.

    SIGTERM is raised as ``SystemExit`` meanwhile, so that nothing is left. What SIGKILL leaves (hidden directories
    beside ``out``, none of which is ``out``) the next call removes.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(out)
    partial = _make(out, "partial")
    with _term_raises():
        try:
            umask = os.umask(0)
            os.umask(umask)
            partial.chmod(0o777 & ~umask)
            yield partial
            _publish(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def clear_leftovers(out: Path) -> None:
    """Remove what killed processes of this machine left beside ``out``; put an ``out`` back that was moved aside."""
    out = out.absolute()
    for kind in ("old", "partial"):
        for left in sorted(out.parent.iterdir()) if out.parent.is_dir() else ():
            if not left.name.startswith(_start(out, kind)):
                continue
            pid = left.name.removeprefix(_start(out, kind)).split("-")[0]
            if not pid.isdecimal() or _is_alive(int(pid)):
                continue
            if kind == "old" and not out.exists() and (left / out.name).exists():
                (left / out.name).rename(out)
            shutil.rmtree(left, ignore_errors=True)


def _start(out: Path, kind: str) -> str:
    return f".{out.name}.{kind}-{socket.gethostname()}-"


def _make(out: Path, kind: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"{_start(out, kind)}{os.getpid()}-", dir=out.parent))


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():  # of a process before us that had the same number, as in a container
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _publish(partial: Path, out: Path) -> None:
    """Put the finished directory in place; an old one is moved aside first and removed last."""
    old = None
    if out.exists():
        old = _make(out, "old")
        out.rename(old / out.name)
    partial.rename(out)
    if old is not None:
        shutil.rmtree(old)


@contextlib.contextmanager
def _term_raises() -> Iterator[None]:
    def stop(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
