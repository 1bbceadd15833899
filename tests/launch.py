"""Start a worker script on several gloo ranks, with a hard time-out and nothing left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent


def torchrun(script: str | Path, *args: object, ranks: int = 1, timeout: float = 240, module: bool = False) -> str:
    """Run ``script`` (a path, or a module name) on ``ranks`` processes of one thread each; return what it printed.

    Raises:
        AssertionError: it failed or ran into the time-out; the message holds the end of its output.
    """
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command += [*(["-m"] if module else []), str(script), *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "GLOO_SOCKET_IFNAME": "lo"}
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
        raise AssertionError(f"{script} ran longer than {timeout} s:\n{output[-4000:]}") from None
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    assert process.returncode == 0, f"{script} exited with {process.returncode}:\n{output[-6000:]}"
    return output
