"""Ranks of one start of a job meet, whatever an earlier start left in the store."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from megavlm.parallel.rendezvous import agree


def meet(store: dist.Store, world_size: int) -> list[str]:
    found: dict[int, str] = {}

    def join(rank: int) -> None:
        found[rank] = agree(store, rank, world_size, timedelta(seconds=300))

    # Rank 0 comes last: the others see what is left of the start before.
    threads = [threading.Thread(target=join, args=(rank,)) for rank in reversed(range(world_size))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(world_size)]


def test_each_start_has_a_name_of_its_own() -> None:
    store = dist.HashStore()
    first, second = meet(store, 3), meet(store, 3)
    assert len(set(first)) == 1 and len(set(second)) == 1 and first[0] != second[0]


def test_a_start_that_broke_off_does_not_disturb_the_next() -> None:
    store = dist.HashStore()
    meet(store, 3)
    with pytest.raises(TimeoutError, match="rank 1: rank 0 was not there"):
        agree(store, 1, 3, timedelta(seconds=0.3))
    assert len(set(meet(store, 3))) == 1
