"""How much memory is free where a model is computed: the GPU's, or what this process may take of the machine's."""

from __future__ import annotations

from pathlib import Path

import torch

from megavlm.parallel.device import has_cuda, local_rank

_CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Return bytes."""
    if has_cuda():
        return int(torch.cuda.mem_get_info(local_rank())[0])
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min(free, _free_of_container(free))


def _free_of_container(free: int) -> int:
    """Return what a container's limit leaves, or ``free`` where there is none (or one of another kind)."""
    try:
        limit, used = (int((_CGROUP / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return free
    return limit - used + int(stat.get("inactive_file", 0))  # file pages are given up when memory is asked for
