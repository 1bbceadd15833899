"""Run a function, a script or ``megavlm`` itself on several ranks that are forked from one warm process.

A start of torchrun imports torch and Megatron-Core once per rank, some 4 s of processor time each; a fork takes
hundredths. The process that they are forked from starts with the first case of a pytest and ends with it::

    losses = ranks.run("training.layout_cases:losses", recipe, world=4)       # what each rank returned, by rank
    done = ranks.megavlm(["train", recipe, "training.train_steps=3"], world=2)  # as torchrun -m megavlm would
    done = ranks.megavlm(["plan", "quickstart"], check=False)                   # as python -m megavlm would
    assert done.code == 2 and "remedy" in done.stderr
    ranks.script(WORKER, job_file, world=2)                                     # as torchrun WORKER would

* A function is named "module:function"; the module is imported in the ranks, from pytest's ``sys.path`` (a worker
  beside the test, or the test module itself). Or give the function itself, if it can be imported by its name.
  Arguments and results are pickled.
* Each case is a fresh fork: module state, environment, random state, working directory of one do not reach the next.
  Ranks get the environment and the working directory that the test has when it calls, and ``env`` over it.
* What a rank raises, and all output, is in the message of :class:`RanksFailed`. A rank that is late writes where its
  threads are. Of a case nothing is left when the call returns, nor when pytest is killed.
* ``start`` does not wait: see :class:`Job`.

What differs from a process of its own: all ranks have one hash seed; modules that other ranks of a real job would
import late are there from the beginning; memory that the warm process holds counts as each rank's. Tests of launchers,
of restarts, and of what is imported when use ``launch.torchrun`` or ``subprocess``.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from rank_server import LAST_WORDS, Case, Outcome

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 600.0
"""Seconds for a case, where the test does not say: ten times what the longest take, as only a hang gets there."""
_SHOWN = 6000


class RanksFailed(AssertionError):  # noqa: N818 - a test that fails, and not an error of this module
    """Some rank did not end well.

    Attributes:
        codes: exit codes by rank, in the order in which they ended; negative for signals.
        tracebacks: by rank, of functions that raised.
        output: what all ranks wrote.
        timed_out: whether they were killed for being late.
    """

    def __init__(self, what: str, outcome: Outcome, tracebacks: Mapping[int, str], output: str) -> None:
        self.codes, self.tracebacks, self.output = outcome.codes, dict(tracebacks), output
        self.timed_out = outcome.timed_out
        ended = [f"rank {rank}: {_how(code)}" for rank, code in outcome.codes.items() if rank not in outcome.killed]
        lines = [f"{what} {'ran into its time-out' if outcome.timed_out else 'failed'}"]
        lines += [*ended, *(f"rank {rank}: killed by us" for rank in outcome.killed)]
        lines += [f"--- rank {rank} raised\n{text}" for rank, text in tracebacks.items()]
        super().__init__("\n".join([*lines, "--- output", output[-_SHOWN:]]))


@dataclass(frozen=True)
class Completed:
    """A command that has ended.

    Args:
        code: 0 if all ranks returned 0, else the exit code of the one that failed first (negative for signals).
        stdout: of all ranks; stderr too, unless the case was started with ``apart``.
        stderr: of all ranks, of a case that was started with ``apart``.
        codes: by rank.
        outlived: command lines of processes that were left when all ranks had ended (and that are killed now).
    """

    code: int
    stdout: str
    stderr: str
    codes: list[int]
    outlived: list[str] = field(default_factory=list)

    @property
    def output(self) -> str:
        """All that was written."""
        return self.stdout + self.stderr


def run(
    target: str | Callable[..., Any], *args: Any, world: int = 1, timeout: float = TIMEOUT,
    env: Mapping[str, str] | None = None, grace: float = 2.0, **kwargs: Any,
) -> list[Any]:  # fmt: skip
    """Call ``target(*args, **kwargs)`` on ``world`` ranks; return what each returned.

    Args:
        target: "module:function", or a function of a module that can be imported.
        args: are pickled.
        world: ranks; with 1, too, it is told that it is a rank.
        timeout: seconds for all of it.
        env: set over the environment of the caller.
        grace: seconds that the others have when one rank has failed.
        kwargs: are pickled.

    Raises:
        RanksFailed: one raised, died, or was late.
    """
    name = target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"
    arguments = pickle.dumps((args, kwargs))
    with _start("function", name, arguments, world, timeout, env, grace=grace) as job:
        return job.results()


def megavlm(
    words: Sequence[object], world: int | None = None, *, check: bool = True, timeout: float = TIMEOUT,
    env: Mapping[str, str] | None = None, stdin: str | None = None, apart: bool | None = None, grace: float = 10.0,
) -> Completed:  # fmt: skip
    """Run ``megavlm`` with the arguments ``words``.

    Args:
        words: of the command line.
        world: ranks, as under torchrun (with 1, too); None: one process, without torchrun.
        check: raise unless all return 0.
        timeout: seconds.
        env: set over the environment of the caller.
        stdin: what it can read.
        apart: keep stderr apart from stdout; by default where there is one process, without torchrun.
        grace: seconds that the others have when one rank has failed; then they are killed.

    Raises:
        RanksFailed: it was late; or one rank failed, and ``check``.
    """
    with start(words, world, timeout=timeout, env=env, stdin=stdin, apart=apart, grace=grace) as job:
        return job.wait(check=check)


def start(
    words: Sequence[object], world: int | None = None, *, timeout: float = TIMEOUT,
    env: Mapping[str, str] | None = None, stdin: str | None = None, apart: bool | None = None, grace: float = 10.0,
    log: Path | None = None, program: Path | None = None,
) -> Job:  # fmt: skip
    """Start ``megavlm`` as the function of that name does, and return at once. Use it as a context.

    Args:
        words: as there, and the others.
        log: a file that output is appended to, and that stays.
        program: a Python file that is run in the place of ``megavlm``.
    """
    apart = world is None if apart is None else apart
    texts, kind = [str(word) for word in words], "script" if program else "megavlm"
    name = str(program or "")
    return _start(kind, name, texts, world or 0, timeout, env, grace=grace, stdin=stdin, together=not apart, log=log)


def script(
    file: str | Path, *words: object, world: int | None = 1, check: bool = True, timeout: float = TIMEOUT,
    env: Mapping[str, str] | None = None, grace: float = 2.0,
) -> Completed:  # fmt: skip
    """Run a Python file as ``torchrun file words`` would on ``world`` ranks; None: as ``python file words``.

    Raises:
        RanksFailed: it was late; or one rank failed, and ``check``.
    """
    with _start("script", str(file), [str(word) for word in words], world or 0, timeout, env, grace=grace) as job:
        return job.wait(check=check)


class Job:
    """Ranks that run. Leaving its context kills what is left of them.

    Attributes:
        pids: by rank.
    """

    def __init__(self, case: Case, connection: Connection) -> None:
        self._case, self._connection = case, connection
        self._outcome: Outcome | None = None
        self.pids: dict[int, int] = self._receive("started", 60)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self._case.directory, ignore_errors=True)

    @property
    def stdout(self) -> str:
        """What was written so far."""
        return self._read(self._case.stdout)

    @property
    def stderr(self) -> str:
        """What was written so far, where it is kept apart."""
        return "" if self._case.stderr == self._case.stdout else self._read(self._case.stderr)

    def poll(self) -> bool:
        """Whether all ranks have ended."""
        return self._outcome is not None or self._connection.poll(0)

    def signal(self, number: int, *ranks: int) -> None:
        """Send a signal to some ranks (none named: to all); nothing happens where all have ended."""
        for rank in () if self.poll() else ranks or self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], number)

    def wait(self, *, check: bool = True, seconds: float | None = None) -> Completed:
        """Wait for all ranks.

        Raises:
            RanksFailed: they were late; or one failed, and ``check``.
            TimeoutError: they have not ended after ``seconds``; they go on.
        """
        if seconds is not None and self._outcome is None and not self._connection.poll(seconds):
            raise TimeoutError(f"{self._name()}: not ended after {seconds} s:\n{self.stdout[-_SHOWN:]}")
        outcome = self._ended()
        bad = [code for code in outcome.codes.values() if code]
        if outcome.timed_out or (bad and check):
            raise RanksFailed(self._name(), outcome, {}, self.stdout + self.stderr)
        codes = [outcome.codes[rank] for rank in sorted(outcome.codes)]
        return Completed(bad[0] if bad else 0, self.stdout, self.stderr, codes, outcome.outlived)

    def results(self) -> list[Any]:
        """Wait for all ranks; return what the function returned on each.

        Raises:
            RanksFailed: one raised, died, or was late.
        """
        outcome, values, tracebacks = self._ended(), {}, {}
        for rank in self.pids:
            file = Path(self._case.directory) / f"result-{rank}"
            if file.exists():
                good, value = pickle.loads(file.read_bytes())
                (values if good else tracebacks)[rank] = pickle.loads(value)
        if len(values) < len(self.pids) or any(outcome.codes.values()):
            raise RanksFailed(self._name(), outcome, tracebacks, self.stdout + self.stderr)
        return [values[rank] for rank in sorted(values)]

    def kill(self) -> None:
        """Kill all of it, and wait until it is gone."""
        if self._connection.closed:
            return
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as other:
            other.shutdown(socket.SHUT_WR)
        # The supervisor closes its side as the last thing that it does.
        with contextlib.suppress(EOFError, OSError):
            while self._connection.poll(30):
                self._connection.recv()
        self._connection.close()

    def _ended(self) -> Outcome:
        if self._outcome is None:
            outcome: Outcome = self._receive("ended", self._case.timeout + 4 * LAST_WORDS + 30)
            _used.append(outcome.processor_seconds)
            self._outcome = outcome
        return self._outcome

    def _receive(self, wanted: str, seconds: float) -> Any:
        if not self._connection.poll(seconds):
            raise RuntimeError(f"{self._name()}: no word from its supervisor in {seconds:.0f} s")
        try:
            word, value = self._connection.recv()
        except EOFError:
            raise RuntimeError(f"{self._name()}: its supervisor died\n{_server().log()}") from None
        assert word == wanted, f"{self._name()}: {word} {value}"
        return value

    @staticmethod
    def _read(name: str) -> str:
        file = Path(name)
        return file.read_text(errors="replace") if file.exists() else ""

    def _name(self) -> str:
        case = self._case
        words = [] if case.kind == "function" else list(case.arguments)
        return " ".join([case.target or "megavlm", *words, f"on {case.world or 1} ranks, {case.timeout:.0f} s"])


def _start(
    kind: str, target: str, arguments: Any, world: int, timeout: float, env: Mapping[str, str] | None,
    *, grace: float, stdin: str | None = None, together: bool = True, log: Path | None = None,
) -> Job:  # fmt: skip
    directory = Path(tempfile.mkdtemp(prefix="ranks-"))
    file = None
    if stdin is not None:
        file = directory / "stdin"
        file.write_text(stdin, encoding="utf-8", errors="surrogateescape")  # also bytes that are no UTF-8
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **(env or {})}
    out = str(log or directory / "stdout")
    path = [*dict.fromkeys([str(ROOT), str(ROOT / "tests"), *sys.path])]
    case = Case(
        kind, target, arguments, world, str(directory), timeout, grace, environment, path, str(Path.cwd()),
        None if file is None else str(file), out, out if together else str(directory / "stderr"),
    )  # fmt: skip
    return Job(case, _server().begin(case))


class _Server:
    """The warm process."""

    def __init__(self) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - has no name, so that a pytest that is killed leaves none
        self._control, other = socket.socketpair()
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        env["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
        with other:
            command = [sys.executable, "-c", f"import rank_server; rank_server.main({other.fileno()})"]
            self.process = subprocess.Popen(
                command, pass_fds=[other.fileno()], stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
                env=env, cwd=ROOT, start_new_session=True,  # Ctrl-C is pytest's
            )  # fmt: skip
        self._pid = os.getpid()
        if self._control.recv(1) != b"+":
            raise RuntimeError(f"the process that ranks are forked from did not start:\n{self.log()}")
        atexit.register(self.close)

    def begin(self, case: Case) -> Connection:
        """Hand a case over."""
        mine, its = socket.socketpair()
        with its:
            socket.send_fds(self._control, [b"x"], [its.fileno()])
        connection = Connection(mine.detach())
        connection.send(case)
        return connection

    @property
    def usable(self) -> bool:
        """Whether it lives, and is this process's own."""
        return self._pid == os.getpid() and self.process.poll() is None

    def log(self) -> str:
        """What it said."""
        return os.pread(self._log.fileno(), 1 << 20, 0).decode(errors="replace")[-_SHOWN:]

    def close(self) -> None:
        """End it, and all cases with it."""
        if self._pid != os.getpid():  # a fork of pytest, which ends
            return
        self._control.close()
        children = psutil.Process(self.process.pid).children() if self.process.poll() is None else []
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()
        self.process.wait()
        psutil.wait_procs(children, timeout=10)  # supervisors see that it is gone, and end their ranks
        self._log.close()


_used: list[float] = []


def processor_seconds() -> float:
    """Return what the ranks of all cases so far have used, in seconds of one processor."""
    return sum(_used)


_the_server: _Server | None = None
_lock = threading.Lock()


def _server() -> _Server:
    """Return the warm process; it is started where there is none (some 5 s)."""
    global _the_server
    with _lock:
        if _the_server is None or not _the_server.usable:
            _the_server = _Server()
        return _the_server


def _how(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
