"""A directory, or a file, that is seen whole or not at all, whenever the process that writes it is stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from megavlm.config.errors import UserError
from megavlm.parallel.lock import held
from megavlm.parallel.processes import Process, is_running, this_process


@contextlib.contextmanager
def new_directory(out: Path, command: str = "prepare", *, replace: bool = True) -> Iterator[Path]:
    """Give a directory beside ``out`` to write into; it becomes ``out`` if nothing is raised.

    SIGTERM is raised as ``SystemExit`` meanwhile, so that nothing is left. What SIGKILL leaves (hidden files and
    directories beside ``out``, none of which is ``out``) the next call removes.

    Args:
        out: the directory.
        command: which of megavlm's commands writes it.
        replace: in the place of what is there; else that must be an empty directory, or nothing.

    Raises:
        HeldError: another process writes it.
        UserError: something has come to be there meanwhile, and is not to be replaced.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with _term_raises(), held(out.with_name(f".{out.name}.lock"), command, f"--out {out}") as lock:
        clear_leftovers(out)
        partial = _make(out, "partial")
        try:
            umask = os.umask(0)
            os.umask(umask)
            partial.chmod(0o777 & ~umask)
            yield partial
            lock.check()
            _publish(partial, out, replace=replace)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def clear_leftovers(out: Path) -> None:
    """Remove what killed processes of this machine left beside ``out``; put an ``out`` back that was moved aside."""
    out = out.absolute()
    for kind in ("old", "partial"):
        for left in sorted(out.parent.iterdir()) if out.parent.is_dir() else ():
            if not left.name.startswith(_start(out, kind)):
                continue
            if not _is_dead(left.name.removeprefix(_start(out, kind))):
                continue
            if kind == "old" and not out.exists() and (left / out.name).exists():
                (left / out.name).rename(out)
            shutil.rmtree(left, ignore_errors=True)


def _start(out: Path, kind: str) -> str:
    return f".{out.name}.{kind}-{socket.gethostname()}-"


def _make(out: Path, kind: str) -> Path:
    us = this_process()
    return Path(tempfile.mkdtemp(prefix=f"{_start(out, kind)}{us.pid}-{_where(us)}.{us.start}-", dir=out.parent))


def _where(process: Process) -> str:
    """Twelve letters for what a process's number is one of: two containers may have one host name."""
    return hashlib.sha256(f"{process.boot} {process.namespace}".encode()).hexdigest()[:12]


def _is_dead(rest: str) -> bool:
    """Whether the process that :func:`_make` put into a name is gone, from what follows the host in it."""
    found = re.match(r"(\d+)-(?:([0-9a-f]{12})\.(\d+)-)?", rest)
    us = this_process()
    if found is None or (found[2] or _where(us)) != _where(us):
        return False
    process = dataclasses.replace(us, pid=int(found[1]), start=int(found[3] or 0))
    if found[2] is None and process.pid == us.pid:  # an older version's, of a process that had our number before
        return True
    return is_running(process) is False


def _publish(partial: Path, out: Path, *, replace: bool) -> None:
    """Put the finished directory in place; an old one is moved aside first and removed last."""
    if not replace:
        try:
            partial.rename(out)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise UserError(f"--out {out}: something was put there meanwhile, and is left as it is") from None
        return
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


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, with the rights that the process gives new files."""
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        Path(partial).chmod(0o666 & ~umask)
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
