"""Signals that reach a reader's worker processes, and garbage that they inherit."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from megavlm.data.worker_signals import StopsWithParent


class Numbers(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10**9))


def seed_and_mark(worker_id: int) -> None:
    torch.manual_seed(worker_id)


def test_workers_outlive_signals_of_others_but_not_the_parents() -> None:
    """Slurm signals every process of a job; the parent ends its workers by SIGTERM when a run goes wrong."""
    loader = DataLoader(
        Numbers(), batch_size=None, num_workers=1, multiprocessing_context="fork",
        worker_init_fn=StopsWithParent(seed_and_mark),
    )  # fmt: skip
    batches = iter(loader)
    assert next(batches) == 0
    (worker,) = batches._workers  # type: ignore[attr-defined]
    for number in (signal.SIGTERM, signal.SIGUSR1):
        other = os.fork()
        if other == 0:
            os.kill(worker.pid, number)
            os._exit(0)
        os.waitpid(other, 0)
    time.sleep(0.2)
    assert worker.is_alive() and [next(batches) for _ in range(5)] == [1, 2, 3, 4, 5]
    os.kill(worker.pid, signal.SIGUSR1)
    time.sleep(0.1)
    assert worker.is_alive()
    worker.terminate()
    worker.join(300)
    assert not worker.is_alive() and not psutil.pid_exists(worker.pid)
    with pytest.raises(RuntimeError, match=r"exited unexpectedly|is killed"):
        for _ in range(100):
            next(batches)


class Threaded:
    """Stands for what waits for its threads when it is destroyed, which a fork has not."""

    def __init__(self) -> None:
        self.home, self.circle = os.getpid(), self

    def __del__(self) -> None:
        if os.getpid() != self.home:
            os._exit(9)


class Collecting(IterableDataset[int]):
    """Collects garbage in the worker, as Energon does."""

    def __iter__(self) -> Iterator[int]:
        for number in range(100):
            gc.collect()
            yield number


def test_a_worker_does_not_destroy_what_it_inherits() -> None:
    loader = DataLoader(
        Collecting(), batch_size=None, num_workers=1, multiprocessing_context="fork",
        worker_init_fn=StopsWithParent(None),
    )  # fmt: skip
    gc.collect()
    gc.disable()
    try:
        Threaded()
        assert [number for number, _ in zip(loader, range(5), strict=False)] == [0, 1, 2, 3, 4]
    finally:
        gc.enable()
        gc.collect()


RANK = """
import sys
from torch.utils.data import DataLoader, IterableDataset
from megavlm.data.worker_signals import StopsWithParent

class Packs(IterableDataset):
    def __iter__(self):
        while True:
            yield bytes(1 << 22)  # more than a pipe holds: a worker waits with it in its hands

loader = DataLoader(Packs(), batch_size=None, num_workers=2, multiprocessing_context="fork",
                    worker_init_fn=StopsWithParent(None))
packs = iter(loader)
next(packs), next(packs)  # one of each worker, which is past its start then
print(*(worker.pid for worker in packs._workers), flush=True)
sys.stdin.read()
"""


def test_workers_end_with_a_parent_that_is_killed() -> None:
    rank = subprocess.Popen([sys.executable, "-c", RANK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    workers = [psutil.Process(int(pid)) for pid in rank.stdout.readline().split()]
    assert len(workers) == 2 and all(worker.is_running() for worker in workers)
    for worker in workers:
        worker.terminate()  # not from its parent
    time.sleep(0.3)
    assert all(worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    rank.kill()
    rank.wait()
    with contextlib.suppress(psutil.NoSuchProcess):  # gone while it was looked at
        psutil.wait_procs(workers, timeout=300)
    alive = [worker for worker in workers if worker.is_running()]
    for worker in alive:
        worker.kill()
    assert not alive
