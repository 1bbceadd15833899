"""A directory that a job of several ranks writes: tried before anything starts, and held by one job at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megavlm.config.errors import FAILED, WRONG_INPUT, OtherRankError, RecipeError, disk_problem, for_users
from megavlm.parallel.lock import LOCK_FILE, LockView, acquire

_TRIAL_BYTES = 1 << 16
_OWN = ("checkpoints", "heartbeats", "loggers", "tensorboard", "profile")
"""Directories inside that a run of another user may have left."""
_WAITING, _HELD, _REFUSED, _BROKEN = range(4)


def try_writing(directory: str | os.PathLike[str], key: str = "output_dir") -> None:
    """Write a file where a command is going to write, and remove it again; nothing is left of a directory made for it.

    Args:
        directory: need not exist.
        key: how users call it.

    Raises:
        RecipeError: it cannot be written to; what to do.
    """
    own = Path(directory)
    try:
        for path in [own, *(own / name for name in _OWN)] if own.is_dir() else [own]:
            if path.is_dir():
                _try_in(path)
        if not own.is_dir():
            there = next(one for one in (own.absolute(), *own.absolute().parents) if os.path.lexists(one))
            if not there.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, f"{there} is no directory")
            # Under a name of our own: another rank may be making the directory itself.
            with tempfile.TemporaryDirectory(prefix=".megavlm-", dir=there) as made:
                _try_in(Path(made))
    except OSError as error:
        error.filename = str(own)  # not that of the trial
        raise RecipeError(f"{key}: {disk_problem(error, own)}") from None


def _try_in(directory: Path) -> None:
    handle, name = tempfile.mkstemp(prefix=".megavlm-", dir=directory)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(os.urandom(_TRIAL_BYTES))  # zeros need no room on some disks
            file.flush()
            os.fsync(file.fileno())
    finally:
        with contextlib.suppress(OSError):
            Path(name).unlink()


@contextlib.contextmanager
def holding(
    directory: str | os.PathLike[str],
    command: str,
    key: str,
    timeout_seconds: float,
    leaving: contextlib.ExitStack | None = None,
) -> Iterator[LockView]:
    """Hold a directory for all ranks of this job inside the block; a collective at its start.

    Args:
        directory: it is made if it is not there.
        command: which of megavlm's commands holds it.
        key: how users call the directory: ``output_dir``.
        timeout_seconds: how long a holder on another machine must have been silent to be taken for dead.
        leaving: ends after the block, and the lock is held until then: the first rank may still write when the groups
            of ranks are gone.

    Yields:
        The lock, on every rank.

    Raises:
        HeldError: another job holds it (on the first rank).
        OtherRankError: the first rank could not take it (on the others).
    """
    import torch  # noqa: PLC0415 - commands of one process need no torch to try a directory
    import torch.distributed as dist  # noqa: PLC0415

    from megavlm.parallel.device import local_device  # noqa: PLC0415

    def tell(state: int) -> int:
        box = torch.tensor([state], dtype=torch.int32, device=local_device())
        dist.broadcast(box, 0)
        return int(box)

    path, lock = Path(directory) / LOCK_FILE, None
    if dist.get_rank() == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            what = f"{key}: {directory}"
            lock = acquire(path, command, what, timeout_seconds=timeout_seconds, waiting=lambda: tell(_WAITING))
        except BaseException as error:
            tell(_REFUSED if for_users(error) else _BROKEN)
            raise
        tell(_HELD)
    else:
        # The first rank may have to watch another's heartbeat for longer than a collective may take.
        while (state := tell(_WAITING)) == _WAITING:
            pass
        if state != _HELD:
            raise OtherRankError(f"{key}: rank 0 says why", WRONG_INPUT if state == _REFUSED else FAILED)
    if lock is not None and leaving is not None:
        leaving.callback(lock.release)
    box = [(lock.token, lock.beat_seconds)] if lock is not None else [("", 0.0)]
    dist.broadcast_object_list(box, 0)
    try:
        yield lock if lock is not None else LockView(path, *box[0], timeout_seconds)
    finally:
        if lock is not None and leaving is None:
            lock.release()
