"""A real ``megavlm serve`` in a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
from launch import ROOT
from ranks import Job
from ranks import start as fork


@dataclass(frozen=True)
class Served:
    """Where it listens."""

    url: str
    log: Path
    picture: Path
    process: Process
    """``megavlm serve``, or torchrun."""


class Process(Protocol):
    """What tests do with a process, as ``subprocess.Popen`` has it."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float) -> int: ...
    def send_signal(self, number: int) -> None: ...
    def kill(self) -> None: ...


class _Forked:
    """Ranks of the fork server; signals go to all of them, as torchrun's do."""

    def __init__(self, job: Job) -> None:
        self._job, self.pid = job, job.pids[0]

    def poll(self) -> int | None:
        return self.wait(0) if self._job.poll() else None

    def wait(self, timeout: float) -> int:
        return self._job.wait(check=False, seconds=timeout).code

    def send_signal(self, number: int) -> None:
        self._job.signal(number)

    def kill(self) -> None:
        self._job.signal(signal.SIGKILL)


@contextlib.contextmanager
def serving(checkpoint: Path, picture: Path, log: Path, *words: str, ranks: int = 1) -> Iterator[Served]:
    """Serve until the block ends; then a signal must end it in order."""
    with started(checkpoint, picture, log, *words, ranks=ranks) as served:
        yield served
        served.process.send_signal(signal.SIGTERM if ranks > 1 else signal.SIGINT)
        code = served.process.wait(300)
        said = log.read_text()
        assert "stopped after" in said and code == 0, said[-3000:]


@contextlib.contextmanager
def started(
    checkpoint: Path,
    picture: Path,
    log: Path,
    *words: str,
    ranks: int = 1,
    torchrun: bool = False,
    hooks: dict[str, str] | None = None,
) -> Iterator[Served]:
    """Serve; nothing of it is left after the block.

    Args:
        checkpoint: what is served.
        picture: that the checkpoint knows.
        log: what the processes say.
        words: more arguments.
        ranks: processes.
        torchrun: start it as users do, for tests of what that sees.
        hooks: the environment of ``hooked.py``, which is then started in the place of ``megavlm``.
    """
    command = ["serve", str(checkpoint), "--port=0", "--name=tiny", *words]
    program = Path(__file__).with_name("hooked.py")
    log.write_text("")
    if not torchrun:
        world = None if ranks == 1 else ranks
        program = program if hooks else None
        with fork(command, world, timeout=7200, env=hooks, apart=False, log=log, program=program) as job:
            process = _Forked(job)
            yield Served(_address(process, log), log, picture, process)
        return
    start = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d"]
    script = ["-m", "megavlm"] if hooks is None else [str(program)]
    command = [sys.executable, *start, "--rdzv-endpoint=localhost:0", *script, *command]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", **(hooks or {})}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=ROOT)
    try:
        yield Served(_address(process, log), log, picture, process)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        process.wait()


def _address(process: Process, log: Path) -> str:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        found = re.search(r"serving tiny on (http://127\.0\.0\.1:\d+)", log.read_text())
        if found:
            return found[1]
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.1)
    raise AssertionError(f"no server after 600 s: {log.read_text()[-3000:]}")
