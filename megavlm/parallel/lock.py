"""One writer at a time in a directory: a lock that also holds on network file systems.

The lock is a small file that says who holds it. It appears under its name whole (a hard link; where there are none, an
exclusive create), so of several starts one gets it. Locks of the file system itself (flock, fcntl) are not asked: what
they mean on NFS, Lustre and the like depends on how they are mounted.

The holder writes a new number into its file every few seconds (the heartbeat). Another start takes the lock over

- at once, where it can see that the holder is dead: the same machine, not restarted since, no such process, or its
  number now belongs to a process that started later;
- at once, where it is the same job come back: Slurm put the job into its queue again, or torchrun started its ranks
  again. The other, if it should still live (a node that lost its network), sees it before it writes;
- else after it has itself seen the same number for so long. No clock of one machine is compared with another's.

Taking over is a rename, allowed to the one start that could create a file named by the lock that it replaces. A holder
that finds another's name in the file, or none, has lost it; one that was hung for longer than a few heartbeats looks
before it goes on (:meth:`LockView.lost`).
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megavlm.config.errors import MachineError, UserError
from megavlm.parallel.processes import Process, is_running, this_process

logger = logging.getLogger(__name__)

LOCK_FILE = "lock.json"
"""Name of the lock in a directory that is locked as a whole."""
TIMEOUT_SECONDS = 60.0
"""A holder that nobody can see, and that was not heard of for so long, is taken for dead."""

_LONGEST_BEAT = 5.0
_BEATS_IN_TIMEOUT = 6
_BEATS_OF_TRUST = 2
"""For so many heartbeats after it was last seen in the file, a holder needs not look again."""
_BYTES = 2048
"""Of a lock file: always the same, so that a heartbeat is one write in its place."""
_LONGEST_TIMEOUT = 3600.0
_POLL_SECONDS = 0.2
_CLAIM_SECONDS = 10.0
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES}


class HeldError(UserError):
    """Another process works in the directory; the text names it."""


class LostError(MachineError):
    """Another process took the lock over while this one was hung, or its file was removed."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock: what its file says."""

    token: str
    """Never used before."""
    command: str
    """What runs there: ``train``."""
    process: Process
    beat_seconds: float
    """Time between two heartbeats."""
    since: str
    """When it took the lock, UTC, for people."""
    jobs: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """By scheduler: the job's name, and how often it was started again."""

    def __str__(self) -> str:
        where = f"on host {self.process.host}, process {self.process.pid}"
        job = "".join(f", Slurm job {name.rpartition('/')[2]}" for name, _ in [self.jobs.get("slurm", ("", 0))] if name)
        return f"megavlm {self.command} ({where}{job}, since {self.since} UTC)"

    def to_bytes(self, beat: int) -> bytes:
        """Return the lock file's contents at heartbeat number ``beat``."""
        text = json.dumps({"beat": f"{beat:012d}", **asdict(self)})
        return text.encode().ljust(_BYTES - 1) + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> Holder | None:
        """Return who wrote ``data``, or None where that is no whole lock file."""
        try:
            found = json.loads(data)
            process = found["process"]
            holder = cls(
                token=str(found["token"]),
                command=str(found["command"])[:40],
                process=Process(
                    str(process["host"])[:80],
                    str(process["boot"]),
                    int(process["namespace"]),
                    int(process["pid"]),
                    int(process["start"]),
                ),
                beat_seconds=float(found["beat_seconds"]),
                since=str(found["since"])[:40],
                jobs={str(name): (str(job), int(starts)) for name, (job, starts) in found["jobs"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
            return None
        # Numbers below 1 mean groups of processes to the kernel.
        return holder if holder.process.pid > 0 and 0 < holder.beat_seconds < _LONGEST_TIMEOUT else None


def _us(command: str, timeout_seconds: float) -> Holder:
    beat = min(_LONGEST_BEAT, timeout_seconds / _BEATS_IN_TIMEOUT)
    since = datetime.now(UTC).isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")
    return Holder(uuid.uuid4().hex, command, this_process(), beat, since, _jobs(os.environ))


def _jobs(environment: Mapping[str, str]) -> dict[str, tuple[str, int]]:
    """Return the jobs that this process is of: their schedulers end one start before the next."""
    found = {}
    if environment.get("SLURM_JOB_ID"):
        name = f"{environment.get('SLURM_CLUSTER_NAME', '')}/{environment['SLURM_JOB_ID']}"
        found["slurm"] = (name[:200], _number(environment.get("SLURM_RESTART_COUNT")))
    if environment.get("TORCHELASTIC_RUN_ID"):
        # The identifier alone is "none" for everybody who does not give one.
        words = [environment.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")]
        found["torchrun"] = ("/".join(words)[:300], _number(environment.get("TORCHELASTIC_RESTART_COUNT")))
    return found


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 0


def _comes_after(one: Holder, other: Holder) -> bool:
    """Whether ``one`` is a later start of the same job as ``other``."""
    return any(
        name == other.jobs[kind][0] and starts > other.jobs[kind][1]
        for kind, (name, starts) in one.jobs.items()
        if kind in other.jobs
    )


def _now() -> float:
    """Seconds that go on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class LockView:
    """A lock as one of the holder's processes sees it.

    Args:
        path: the lock's file.
        token: of the holder.
        beat_seconds: time between its heartbeats.
        timeout_seconds: after so long without a look at the file, nothing is known.
    """

    def __init__(self, path: Path, token: str, beat_seconds: float, timeout_seconds: float) -> None:
        self.path, self.token = path, token
        self.beat_seconds, self.timeout_seconds = beat_seconds, timeout_seconds
        self._lost = ""
        self._seen = _now()
        self._silent = False  # others cannot know that we live

    def lost(self) -> bool:
        """Whether nothing may be written any more: the lock is another's.

        Reads the file where it was not seen for some heartbeats: after a hang, before anything else is done.
        """
        if not self._lost and (self._silent or _now() - self._seen > _BEATS_OF_TRUST * self.beat_seconds):
            self.look()
        return bool(self._lost)

    def check(self) -> None:
        """Go on only if the lock is ours.

        Raises:
            LostError: it is not; the text says whose it is.
        """
        if self.lost():
            raise LostError(self._lost)

    def look(self) -> None:
        """Read the file now."""
        before = _now()
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            self._lose("it was removed")
        except OSError as error:  # a server that does not answer for a moment
            if before - self._seen > self.timeout_seconds:
                self._lose(f"it cannot be read: {error.strerror}")
        else:
            holder = Holder.from_bytes(data)
            if holder is not None and holder.token == self.token:
                self._seen = before
            else:
                self._lose(f"it is held by {holder or 'another'} now, as this run was not heard of for too long")

    def _lose(self, why: str) -> None:
        self._lost = f"lost the lock {self.path}: {why}; this run stops here"


class Lock(LockView):
    """A lock that this process holds, with the thread that keeps its heartbeat; :func:`acquire` makes one."""

    def __init__(self, path: Path, holder: Holder, timeout_seconds: float) -> None:
        super().__init__(path, holder.token, holder.beat_seconds, timeout_seconds)
        self.holder = holder
        self._handle = os.open(path, os.O_RDWR)
        self._owner = os.getpid()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="megavlm-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the lock back; may be called again, and does nothing in a forked process."""
        if os.getpid() != self._owner or self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        os.close(self._handle)
        self.look()
        if not self._lost:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def _keep(self) -> None:
        beat = 0
        while not self._stop.wait(self.beat_seconds):
            self.look()
            if self._lost:
                return
            beat += 1
            # By the handle: a file that took the place of ours is not written to.
            try:
                os.pwrite(self._handle, self.holder.to_bytes(beat), 0)
                os.fsync(self._handle)
            except OSError as error:  # a full disk; another machine may take us for dead, and we shall see that
                if not self._silent:
                    logger.warning("%s: no heartbeat was written: %s", self.path, error)
                self._silent = True
            else:
                self._silent = False


def acquire(
    path: Path,
    command: str,
    what: str,
    *,
    timeout_seconds: float = TIMEOUT_SECONDS,
    waiting: Callable[[], object] = lambda: None,
) -> Lock:
    """Take the lock at ``path``.

    Args:
        path: its file; the directory must exist.
        command: which of megavlm's commands wants it.
        what: is locked, in words and with its key: ``output_dir: runs/sft``.
        timeout_seconds: how long a holder on another machine must have been silent.
        waiting: called several times a second while this waits.

    Raises:
        HeldError: the holder lives.
        OSError: the file cannot be written.
    """
    us = _us(command, timeout_seconds)
    while not _created(path, us):
        data = _read(path)
        if data is not None and _succeed(path, data, us, what, timeout_seconds, waiting):
            break
    _tidy(path)
    return Lock(path, us, timeout_seconds)


def _succeed(
    path: Path, data: bytes, us: Holder, what: str, timeout_seconds: float, waiting: Callable[[], object]
) -> bool:
    """Take over the lock with ``data``, from a holder that is dead; whether we did, and it has not changed meanwhile.

    Raises:
        HeldError: the holder lives.
    """
    holder = Holder.from_bytes(data)
    held_by = f"{what} is held by {holder}; wait until it ends, or end it, or choose another directory"
    running = is_running(holder.process) if holder is not None else None
    returned = holder is not None and _comes_after(us, holder)
    if holder is not None and running:
        if returned:
            logger.info("waiting for this job's last start to end: %s", holder)
            if _wait(lambda: not is_running(holder.process), timeout_seconds, waiting):
                return False
        raise HeldError(held_by)
    if running is None and not returned:
        silence = timeout_seconds if holder is None else max(timeout_seconds, 3 * holder.beat_seconds)
        who = holder or "its holder"
        logger.info("%s: whether %s lives cannot be seen from here; watching it for %.0f s", what, who, silence)
        if _wait(lambda: _read(path) != data, silence, waiting):
            if holder is not None and _token(_read(path)) == holder.token:
                raise HeldError(held_by)
            return False
    if not _take_over(path, data, us, waiting):
        return False
    logger.info("%s was held by %s, which is gone", what, holder or "a start that broke off")
    if running is None and returned and holder is not None:
        # Should it live all the same, it has seen by the end of this that it lost the lock.
        _wait(lambda: False, (_BEATS_OF_TRUST + 1) * holder.beat_seconds, waiting)
    return True


@contextlib.contextmanager
def held(path: Path, command: str, what: str, *, timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[Lock]:
    """Hold the lock at ``path`` inside the block; :func:`acquire` has the arguments and what is raised."""
    lock = acquire(path, command, what, timeout_seconds=timeout_seconds)
    try:
        yield lock
    finally:
        lock.release()


def read_holder(path: Path) -> tuple[Holder, bool | None] | None:
    """Return who holds the lock at ``path`` and whether it is seen to live (None: not from here); None if nobody."""
    data = _read(path)
    holder = Holder.from_bytes(data) if data is not None else None
    return None if holder is None else (holder, is_running(holder.process))


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.ESTALE:  # NFS: it was replaced while we opened it
            raise
        return None


def _token(data: bytes | None) -> str | None:
    """What tells one lock file from all others; of one that is no whole lock file, a digest."""
    if data is None:
        return None
    holder = Holder.from_bytes(data)
    return holder.token if holder is not None else hashlib.sha256(data).hexdigest()[:32]


def _created(path: Path, us: Holder) -> bool:
    """Return what :func:`_create` does; an error names the directory, not our file in it."""
    try:
        return _create(path, us)
    except OSError as error:
        error.filename, error.filename2 = str(path.parent), None
        raise


def _create(path: Path, us: Holder) -> bool:
    """Make the lock file if there is none; whether we did."""
    with _written_beside(path, us) as mine:
        try:
            os.link(mine, path)
            return True
        except FileExistsError:
            # Over NFS an answer may be lost and the request sent again: the count of links knows.
            return mine.stat().st_nlink > 1
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
    try:  # a file system without links; who dies between the two lines leaves an empty file, which is waited for
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(handle, us.to_bytes(0))
        os.fsync(handle)
    finally:
        os.close(handle)
    return True


def _take_over(path: Path, data: bytes, us: Holder, waiting: Callable[[], object]) -> bool:
    """Put our lock in the place of the one with ``data``; whether we did, and no other start."""
    token = _token(data)
    claim = path.with_name(f"{path.name}.{token}.taken")
    with _written_beside(path, us) as mine:
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            # Another start does the same now. One that died in these few lines must not be waited for for ever.
            if not _wait(lambda: not claim.exists(), _CLAIM_SECONDS, waiting):
                claim.unlink(missing_ok=True)
            return False
        try:
            if _token(_read(path)) != token:
                return False
            mine.rename(path)
        finally:
            claim.unlink(missing_ok=True)
    return _token(_read(path)) == us.token


@contextlib.contextmanager
def _written_beside(path: Path, us: Holder) -> Iterator[Path]:
    """Give a whole lock file of ours under another name, which is gone after the block."""
    mine = path.with_name(f"{path.name}.{us.token}.new")
    try:
        with mine.open("wb") as file:
            file.write(us.to_bytes(0))
            file.flush()
            os.fsync(file.fileno())
        yield mine
    finally:
        mine.unlink(missing_ok=True)


def _tidy(path: Path) -> None:
    """Remove what starts that were killed while they took the lock left."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.new"):
        holder = Holder.from_bytes(_read(left) or b"")
        if holder is not None and is_running(holder.process) is False:
            left.unlink(missing_ok=True)


def _wait(done: Callable[[], Any], seconds: float, waiting: Callable[[], object]) -> bool:
    """Wait until ``done()``; whether it was in time."""
    end = _now() + seconds
    while not done():
        if _now() > end:
            return False
        waiting()
        time.sleep(_POLL_SECONDS)
    return True
