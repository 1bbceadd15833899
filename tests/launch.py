"""Start a worker script under torchrun, with a hard time-out and nothing left running.

For tests of what torchrun itself sees, does, and is shown by: ranks that die, restarts. All others use ``ranks``, whose
processes have imported everything before they start.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent


def torchrun(script: str | Path, *args: object, ranks: int = 1, timeout: float = 240, module: bool = False) -> str:
    """Run ``script`` (a path, or a module name) on ``ranks`` processes of one thread each; return what it printed.

    Raises:
        AssertionError: it failed or ran into the time-out; the message holds the end of its output.
    """
    words = [*(["-m"] if module else []), str(script), *map(str, args)]
    code, output = under_torchrun(words, ranks=ranks, timeout=timeout)
    assert code == 0, f"{script} exited with {code}:\n{output[-6000:]}"
    return output


def under_torchrun(
    words: Sequence[str], *, ranks: int, timeout: float = 240, restarts: int = 0, env: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Return torchrun's exit code, and what it and its ranks printed.

    Args:
        words: script and arguments; or ``-m``, a module, and arguments.
        ranks: processes.
        timeout: seconds.
        restarts: how often torchrun starts all of them again.
        env: set over this process's environment.

    Raises:
        AssertionError: it ran into the time-out; the message holds the end of its output.
    """
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", f"--max-restarts={restarts}", *words]
    always = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "GLOO_SOCKET_IFNAME": "lo"}
    env = {**os.environ, **always, **(env or {})}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=ROOT, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # torchrun's workers have sessions of their own; none may outlive it.
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
        output, _ = process.communicate()
        raise AssertionError(f"{' '.join(words)} ran longer than {timeout} s:\n{output[-4000:]}") from None
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return process.returncode, output
