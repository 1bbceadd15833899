"""Meeting the other ranks of this start of the job, and not those of the one before.

torchrun keeps one store over its restarts, with the addresses of processes that are gone: gloo then tries to reach
them and fails. So each start gets a part of the store of its own, named by rank 0; a rank that still reads the old
name gets no answer there, as answers carry what the rank itself wrote.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta
from typing import Any

from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

_GENERATION = "megavlm/generation"
_POLL_SECONDS = 0.02


def fresh_store(timeout: timedelta) -> tuple[Any, int, int]:
    """Return a store for this start of the job that ``torchrun`` describes, this process's rank and the world size.

    Raises:
        TimeoutError: the others did not come in time.
    """
    store, rank, world_size = next(iter(rendezvous("env://", timeout=timeout)))
    return distributed_c10d.PrefixStore(f"megavlm/{agree(store, rank, world_size, timeout)}", store), rank, world_size


def agree(store: Any, rank: int, world_size: int, timeout: timedelta) -> str:
    """Return the name of this start, the same on all ranks and never used before.

    Raises:
        TimeoutError: rank 0 did not come in time.
        DistStoreError: (on rank 0, from the store) another rank did not come within the store's own time-out.
    """
    if rank == 0:
        name = uuid.uuid4().hex
        store.set(_GENERATION, name)
        for other in range(1, world_size):
            store.set(f"megavlm/{name}/answer/{other}", store.get(f"megavlm/{name}/hello/{other}"))
        return name
    token, deadline, name = uuid.uuid4().hex.encode(), time.monotonic() + timeout.total_seconds(), ""
    while time.monotonic() < deadline:
        if store.check([_GENERATION]):
            current = store.get(_GENERATION).decode()
            if current != name:
                name = current
                store.set(f"megavlm/{name}/hello/{rank}", token)
            answer = f"megavlm/{name}/answer/{rank}"
            if store.check([answer]) and store.get(answer) == token:
                return name
        time.sleep(_POLL_SECONDS)
    raise TimeoutError(f"rank {rank}: rank 0 was not there within {timeout}")
