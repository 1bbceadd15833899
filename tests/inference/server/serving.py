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

import psutil
from launch import ROOT


@dataclass(frozen=True)
class Served:
    """Where it listens."""

    url: str
    log: Path
    picture: Path
    process: subprocess.Popen[bytes]
    """``megavlm serve``, or torchrun."""


@contextlib.contextmanager
def serving(checkpoint: Path, picture: Path, log: Path, *words: str, ranks: int = 1) -> Iterator[Served]:
    """Serve until the block ends; then a signal must end it in order."""
    with started(checkpoint, picture, log, *words, ranks=ranks) as served:
        yield served
        served.process.send_signal(signal.SIGTERM if ranks > 1 else signal.SIGINT)
        code = served.process.wait(40)
        said = log.read_text()
        # torchrun reports any signal as a failure.
        assert "stopped after" in said and (ranks > 1 or code == 0), said[-3000:]


@contextlib.contextmanager
def started(
    checkpoint: Path, picture: Path, log: Path, *words: str, ranks: int = 1, hooks: dict[str, str] | None = None
) -> Iterator[Served]:
    """Serve; nothing of it is left after the block.

    Args:
        checkpoint: what is served.
        picture: that the checkpoint knows.
        log: what the processes say.
        words: more arguments.
        ranks: processes.
        hooks: the environment of ``hooked.py``, which is then started in the place of ``megavlm``.
    """
    program = ["-m", "megavlm"] if hooks is None else [str(Path(__file__).with_name("hooked.py"))]
    command = [sys.executable, *program, "serve", str(checkpoint), "--port=0", "--name=tiny", *words]
    if ranks > 1:
        start = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d"]
        command = [sys.executable, *start, "--rdzv-endpoint=localhost:0", *command[1:]]
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


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = re.search(r"serving tiny on (http://127\.0\.0\.1:\d+)", log.read_text())
        if found:
            return found[1]
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.1)
    raise AssertionError(f"no server after 120 s: {log.read_text()[-3000:]}")
