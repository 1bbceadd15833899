"""What a stopwatch counts as what, on one rank and with real collectives of one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup, Work

from megavlm.parallel import stopwatch
from megavlm.parallel.device import has_cuda, local_device, peak_memory_gib
from megavlm.parallel.stopwatch import BACKWARD, FINISH, FORWARD, SCHEDULE, StepTimes, Stopwatch


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still but for a second in each wait, and where a test moves it."""
    now, plain = [0.0], Work.wait

    def wait(self: Work, *args: Any) -> Any:
        now[0] += 1
        return plain(self, *args)

    monkeypatch.setattr(Work, "wait", wait)
    monkeypatch.setattr(stopwatch._Clock, "now", lambda self: now[0])
    monkeypatch.setattr(stopwatch._Clock, "between", lambda self, begin, end: end - begin)
    return now


def reduce() -> None:
    dist.all_reduce(torch.ones(4))


def test_waits_count_where_they_happen(alone: None, ticks: list[float]) -> None:
    slow_wait, config = vars(Work)["wait"], SimpleNamespace(timers=None)
    watch = Stopwatch([config])
    for _ in range(2):  # a second step begins from nothing
        watch.start()
        reduce()  # handing out the data
        watch.fetched()
        timers = config.timers
        timers(SCHEDULE, log_level=1).start(barrier=True)
        for _ in range(2):
            timers(FORWARD, log_level=2).start()
            reduce()
            timers(FORWARD).stop()
        reduce()
        timers(BACKWARD, log_level=2).start()
        ticks[0] += 10
        timers(BACKWARD).stop()
        timers(FINISH, log_level=1).start(barrier=True)
        reduce()
        timers(FINISH).stop()
        timers(SCHEDULE).stop()
        reduce()
        times = watch.stop(lambda: None)
        assert times == StepTimes(
            step=16, data=1, schedule=13, update=2, forward=2, backward=10,
            waiting_in_compute=2, waiting_between=1, waiting_after=2,
        )  # fmt: skip
    assert config.timers is None and vars(Work)["wait"] is slow_wait


def test_other_threads_are_not_the_step(alone: None, ticks: list[float]) -> None:
    watch = Stopwatch([])
    watch.start()
    watch.fetched()
    watch(SCHEDULE).start()
    thread = threading.Thread(target=reduce)
    thread.start()
    thread.join()
    watch(FINISH).start()
    watch(FINISH).stop()
    watch(SCHEDULE).stop()
    times = watch.stop(lambda: None)
    assert times is not None and times.waiting_between == 0.0 and times.schedule == 1


def test_a_step_that_breaks_off_has_no_times_and_leaves_nothing_behind() -> None:
    plain = {**vars(Work), **vars(ProcessGroup)}
    config = SimpleNamespace(timers=None)
    watch = Stopwatch([config])
    watch.start()
    assert {**vars(Work), **vars(ProcessGroup)} != plain
    config.timers(SCHEDULE).start()
    watch.cancel()
    assert {**vars(Work), **vars(ProcessGroup)} == plain and config.timers is None
    watch.cancel()  # again, at the end of the run
    watch.start()
    watch.fetched()
    assert watch.stop(lambda: None) is None


def test_peak_memory_is_this_process() -> None:
    before = peak_memory_gib()
    block = torch.ones(80 * 2**20 // 4, device=local_device())
    assert peak_memory_gib() >= before and peak_memory_gib() > block.nbytes / 2**30


@pytest.mark.gpu
@pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device")
def test_times_on_a_gpu_are_those_of_its_stream() -> None:
    """The host is through at once; the marks are when the work is done."""
    a = torch.randn(8192, 8192, device=local_device())
    watch = Stopwatch([])
    for _ in range(2):
        watch.start()
        watch.fetched()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        watch(SCHEDULE).start()
        watch(FORWARD).start()
        for _ in range(10):
            a @ a
        watch(FORWARD).stop()
        watch(FINISH).start()
        torch.cuda.synchronize()
        host = time.perf_counter() - begin
        watch(FINISH).stop()
        watch(SCHEDULE).stop()
        times = watch.stop(torch.cuda.synchronize)
    assert times is not None and times.forward == pytest.approx(host, rel=0.2)
