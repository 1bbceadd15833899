"""What ``test_ranks`` lets the ranks do."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megavlm.config.schema import ParallelConfig
from megavlm.parallel.state import process_groups

changed = "no"


def summed(value: int, *, times: int) -> tuple[int, int, torch.Tensor]:
    """Return rank, world size and the sum over ranks of ``value`` + rank, by a real collective."""
    with process_groups(ParallelConfig(), seed=1):
        tensor = torch.tensor(value + dist.get_rank())
        for _ in range(times):
            dist.all_reduce(tensor)
        return dist.get_rank(), dist.get_world_size(), tensor


def world_as_seen() -> dict[str, Any]:
    """Return what must be as in a fresh process, and then change it."""
    global changed
    seen = {
        "changed": changed, "cwd": str(Path.cwd()), "mark": os.environ.get("MARK"), "threads": threading.active_count(),
        "torch": float(torch.rand(1)), "numpy": float(np.random.rand()), "random": random.random(),
        "open": len([*Path("/proc/self/fd").iterdir()]), "argv": len(sys.argv),
    }  # fmt: skip
    changed, os.environ["MARK"] = "yes", "left behind"
    os.chdir("/")
    torch.manual_seed(5)
    return seen


def raising(rank: int) -> None:
    """Raise on one rank while the others wait for it."""
    print(f"rank {os.environ['RANK']} was here", file=sys.stderr)
    with process_groups(ParallelConfig(), seed=1):
        if dist.get_rank() == rank:
            raise ValueError("the seventh seal")
        dist.barrier()


def ending(rank: int, how: int | str) -> str:
    """One rank kills itself by a signal, or leaves with an exit code; the others wait for it in vain."""
    if int(os.environ["RANK"]) != rank:
        threading.Event().wait()
    elif isinstance(how, str):
        os.kill(os.getpid(), getattr(signal, how))
    else:
        os._exit(how)
    return "well"


def hanging_with_helpers(pids: str) -> None:
    """Start helpers that do not die with their parent, one of them deaf to SIGTERM; then hang."""
    program = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.setsid(); time.sleep(300)"
    helper = subprocess.Popen([sys.executable, "-c", program])
    orphan = subprocess.run(["sh", "-c", "sleep 300 >/dev/null 2>&1 & echo $!"], capture_output=True, check=True)
    file = Path(pids) / os.environ["RANK"]
    file.with_suffix(".part").write_text(f"{os.getpid()} {helper.pid} {int(orphan.stdout)}")
    file.with_suffix(".part").rename(file)
    a_place_to_be_found()


def a_place_to_be_found() -> None:
    """Wait for what never comes."""
    threading.Event().wait()


def leaving_one_behind() -> int:
    """Return well, though a process of ours goes on."""
    return subprocess.Popen(["sleep", "300"]).pid


def unpicklable() -> Any:
    """Return what no other process can have."""
    return threading.Lock()


if __name__ == "__main__":
    with process_groups(ParallelConfig(), seed=1):
        print(f"script {sys.argv[1]} on rank {dist.get_rank()} of {dist.get_world_size()}")
