"""The device that this process computes on, and what Megatron-Core needs to be told about it.

:func:`prepare_device` is the first thing that a program calls, before Megatron-Core is imported. With CUDA it
sets a few defaults (and, without a C compiler, keeps Megatron-Core from compiling). Without, it makes the few
``torch.cuda`` names that Megatron-Core uses mean the CPU, so that its own schedules, layers, optimizer and
checkpoints run over gloo.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from megavlm import garbage
from megavlm.config.errors import RecipeError
from megavlm.parallel.peaks import peak_flops_of

logger = logging.getLogger(__name__)

# Newest allocations that a memory snapshot holds: some steps of a large model, and files below a GiB.
_MEMORY_EVENTS = 1_000_000

_prepared = False


def has_cuda() -> bool:
    """Whether this process computes on a CUDA device."""
    return torch.cuda.is_available()


def prepare_device() -> None:
    """Make Megatron-Core usable on this machine; call it before the first ``import megatron.core``.

    Raises:
        RuntimeError: there is no CUDA device and Megatron-Core was imported before this call.
        RecipeError: more processes than GPUs were started on this node.
    """
    global _prepared
    if _prepared:
        return
    if has_cuda():
        _check_local_rank()
        _set_up_cuda()
        garbage.as_usual()
        if not _has_compiler() and "megatron.core" not in sys.modules:
            from megavlm.parallel import cpu_layer  # noqa: PLC0415

            logger.warning("no C compiler, which torch.compile needs: Megatron-Core's fused functions run unfused")
            cpu_layer.keep_python_functions()
        _prepared = True
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("call megavlm.parallel.device.prepare_device() before importing megatron.core")
    from megavlm.parallel import cpu_layer  # noqa: PLC0415  (patches torch when imported by a CPU process only)

    cpu_layer.install()
    garbage.as_usual()
    _prepared = True


def _check_local_rank() -> None:
    if local_rank() >= torch.cuda.device_count():
        raise RecipeError(
            f"LOCAL_RANK: this is process {local_rank()} of its node, which has {torch.cuda.device_count()} GPU(s); "
            "start as many processes as there are GPUs (torchrun --nproc-per-node), or hide the GPUs with "
            "CUDA_VISIBLE_DEVICES= to compute on the CPU"
        )


def _set_up_cuda() -> None:
    """What Megatron-Core and torch should know before the first kernel."""
    # Megatron-Core overlaps collectives and products by the order in which they are issued: one hardware queue.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # cuDNN's attention builds and keeps a plan for every shape, and packs and numbers of pictures are ever new.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if "megatron.core" not in sys.modules:
        _hide_broken_transformer_engine()


def _hide_broken_transformer_engine() -> None:
    """Let an installed Transformer Engine that cannot be imported count as absent.

    Megatron-Core imports it wherever it is found, and would fail to import itself.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return
    try:
        import transformer_engine.pytorch  # noqa: F401, PLC0415 - only where it is installed
    except Exception as error:  # whatever a half-installed package raises
        logger.warning(
            "Transformer Engine is installed but cannot be imported, so torch's layers run: %s: %s",
            type(error).__name__,
            str(error).splitlines()[0] if str(error) else "",
        )
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
            del sys.modules[name]
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # import and find_spec say "not there"


def transformer_engine_installed() -> bool:
    """Whether Transformer Engine is installed, and not hidden by :func:`prepare_device` as it is broken."""
    return importlib.util.find_spec("transformer_engine") is not None


def use_local_device() -> None:
    """Let the calling thread allocate and compute on this process's device: a new thread stands on the first one."""
    if has_cuda():
        torch.cuda.set_device(local_device())


def _has_compiler() -> bool:
    return "CC" in os.environ or any(shutil.which(name) for name in ("cc", "gcc", "clang"))


def local_device() -> torch.device:
    """Return the device of this process: its own CUDA device, or the CPU."""
    return torch.device("cuda", local_rank()) if has_cuda() else torch.device("cpu")


def local_rank() -> int:
    """Return the rank of this process on its node (``LOCAL_RANK``, which torchrun sets)."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def backend() -> str:
    """Return the torch.distributed backend of this machine."""
    return "nccl" if has_cuda() else "gloo"


def current_gpu() -> int | None:
    """Return the index of the GPU that this thread computes on, or None on a CPU."""
    return torch.cuda.current_device() if has_cuda() else None


def gpu_count() -> int:
    """Return how many GPUs this process sees."""
    return torch.cuda.device_count() if has_cuda() else 0


def has_kernels() -> bool:
    """Whether the fused kernels of torch, Megatron-Core and Transformer Engine, which need a GPU, can run."""
    return has_cuda()


def frees_sent_outputs() -> bool:
    """Whether a pipeline stage may free what it has sent: over gloo such outputs train wrongly."""
    return has_cuda()


def records_memory() -> bool:
    """Whether allocations of device memory can be recorded here."""
    return has_cuda()


def device_random_state() -> torch.Tensor | None:
    """Return the state of the GPU's random numbers; None on a CPU, whose state is torch's own."""
    return torch.cuda.get_rng_state() if has_cuda() else None


def restore_device_random_state(state: torch.Tensor) -> None:
    """Go on from what :func:`device_random_state` returned on this or another machine; a CPU leaves it aside."""
    if has_cuda():
        torch.cuda.set_rng_state(state)


def current_stream(device: torch.device) -> Any:
    """Return torch's stream of a GPU."""
    return torch.cuda.current_stream(device)


def synchronize() -> None:
    """Wait for the device, so that a wall-clock time is honest."""
    if has_cuda():
        torch.cuda.synchronize()


def own_memory() -> tuple[float, bool]:
    """Return the bytes of this process's memory, and whether they are the host's: an even part for each process."""
    if has_cuda():
        return float(torch.cuda.get_device_properties(local_device()).total_memory), False
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return host / int(os.environ.get("LOCAL_WORLD_SIZE", "1")), True


def max_memory_gib() -> float | None:
    """Return the peak of allocated device memory in GiB, or None on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if has_cuda() else None


def peak_memory_gib() -> float:
    """Return the peak so far in GiB: of allocated device memory, or on a CPU of this process's resident memory."""
    on_device = max_memory_gib()
    if on_device is not None:
        return on_device
    # Not getrusage's ru_maxrss: a process starts with that of the one that started it.
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20  # KiB
    return 0.0


def profiled_activities() -> list[torch.profiler.ProfilerActivity]:
    """Return what a profiler can see here: the CPU's work, and the GPU's where there is one."""
    activity = torch.profiler.ProfilerActivity
    return [activity.CPU, activity.CUDA] if has_cuda() else [activity.CPU]


def start_memory_history() -> None:
    """Begin to record every allocation of device memory; CUDA only."""
    torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)


def dump_memory_history(path: Path) -> None:
    """Write what was recorded for https://pytorch.org/memory_viz, and stop recording.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def peak_flops(precision: str) -> float | None:
    """Return the device's peak FLOP/s for ``precision`` ("bf16" or "fp8"), or None where it is not known."""
    return peak_flops_of(torch.cuda.get_device_name(), precision) if has_cuda() else None
