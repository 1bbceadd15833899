"""Without CUDA, the names that Megatron-Core uses mean the CPU; a process that is too late is told so."""

from __future__ import annotations

import gc
import sys
import types
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megavlm.config.schema import ParallelConfig
from megavlm.parallel import device
from megavlm.parallel.device import has_cuda, local_device, prepare_device
from megavlm.parallel.state import process_groups

pytestmark = pytest.mark.skipif(has_cuda(), reason="the layer is for processes without CUDA")


@pytest.mark.parametrize("name", ["empty", "ones", "zeros"])
def test_factories_give_cpu_tensors(name: str) -> None:
    made = getattr(torch, name)(2, 3, device="cuda", pin_memory=True)
    assert made.device == local_device() == torch.device("cpu")
    assert made.shape == (2, 3)


@pytest.mark.parametrize("name", ["empty", "ones", "zeros"])
def test_a_meta_device_context_still_works(name: str) -> None:
    with torch.device("meta"):
        assert getattr(torch, name)(2).device.type == "meta"
        assert torch.nn.Linear(2, 2).weight.device.type == "meta"
        assert getattr(torch, name)(2, device="cuda").device.type == "cpu"
    assert getattr(torch, name)(2).device.type == "cpu"


def test_moving_to_cuda_is_no_move() -> None:
    x = torch.ones(2)
    assert x.cuda() is x
    module = torch.nn.Linear(2, 2)
    assert module.cuda() is module
    assert x.type() == "torch.cuda.FloatTensor"
    assert x.bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert x.type(torch.float64).dtype is torch.float64


def test_the_device_generator_is_the_cpu_generator() -> None:
    torch.cuda.manual_seed(11)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    torch.manual_seed(11)
    assert torch.equal(torch.rand(3), first)


def test_streams_and_events_do_nothing_and_say_so() -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        event = stream.record_event()
    event.wait()
    stream.synchronize()
    torch.cuda.synchronize()
    assert isinstance(event, torch.cuda.Event)
    assert not torch.cuda.is_available()


def test_preparing_twice_changes_nothing() -> None:
    before = torch.empty
    prepare_device()
    assert torch.empty is before


def test_preparing_after_megatron_core_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core", types.ModuleType("megatron.core"))
    monkeypatch.setattr(device, "_prepared", False)
    with pytest.raises(RuntimeError, match="before importing megatron"):
        prepare_device()


def test_torch_compile_is_left_as_it_was() -> None:
    assert torch.compile.__module__ == "torch"


def _loops() -> int:
    """Return how many of this process's threads are gloo's that wake."""
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum(name.startswith("gloo_tcp_loop") for name in names)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
@pytest.mark.parametrize("interfaces", ["lo", "lo,lo", ""])
def test_all_groups_of_a_process_share_one_device(interfaces: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with those of the job before, which something may still hold."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interfaces)
    gc.collect()
    before, held = _loops(), []
    for minutes in (3, 4):
        with process_groups(ParallelConfig(distributed_timeout_minutes=minutes), seed=0):
            group = dist.group.WORLD
            assert group is not None
            held.append(group._get_backend(torch.device("cpu")))
            assert isinstance(held[-1], distributed_c10d.ProcessGroupGloo)
            assert held[-1].options._timeout == timedelta(minutes=minutes)
            numbers = torch.ones(3)
            dist.all_reduce(numbers)
            assert numbers.tolist() == [1, 1, 1]
    assert _loops() <= before + max(1, len(interfaces.split(",")))
