"""What a rank sees of one that is gone, or late."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from megavlm.parallel.state import is_lost_peer

PATIENCE = 4
"""Seconds."""


def _told(work: Callable[[], object]) -> tuple[str, bool]:
    try:
        work()
    except Exception as error:
        wrapped = OSError("not saved")
        wrapped.__cause__ = error
        return f"{type(error).__name__}: {error}", is_lost_peer(error) and is_lost_peer(wrapped)
    return "no error", False


def lost(late: bool) -> list[tuple[str, bool]]:
    """Return rank 0's errors and what they are taken for, as rank 1 leaves, or is ``late`` for all of it."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
    store = dist.distributed_c10d._get_default_store()
    tensor = torch.ones(3)
    dist.all_reduce(tensor)
    if dist.get_rank() == 1:
        while late and not store.check(["seen"]):
            time.sleep(0.05)
        return []
    work = (lambda: dist.all_reduce(tensor), lambda: dist.irecv(tensor, 1).wait(), lambda: dist.barrier())
    found = [_told(one) for one in work]
    store.set("seen", "")
    return found
