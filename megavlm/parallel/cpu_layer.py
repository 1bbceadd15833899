"""What Megatron-Core needs to run without CUDA: a few ``torch.cuda`` names that mean the CPU.

Only names that raise without a GPU, or that are gloo's, or slow on a CPU are replaced, and only in a process that has
none. Each entry was found by running Megatron-Core 0.16 on gloo; the reasons stand beside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch


def install() -> None:
    """Replace the names. Called once, by :func:`megavlm.parallel.device.prepare_device`."""
    # That neither Apex nor Transformer Engine is here is known.
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    _hide_cuda_packages()
    _keep_freed_memory()
    _streams_and_devices()
    _random_state()
    _factories()
    _tensor_methods()
    keep_python_functions()
    _slips_of_megatron()
    _quick_maximum()
    _collectives_of_one()
    _one_device_of_gloo()


def _hide_cuda_packages() -> None:
    """Make Megatron-Core find neither Transformer Engine nor Apex: their optimizer and norms need a GPU.

    That matters on a GPU machine in a process that may see none of its GPUs.
    """
    for name in ("transformer_engine", "apex", "amp_C", "flash_attn"):
        # ``import`` then raises ImportError.
        cast(dict[str, Any], sys.modules).setdefault(name, None)


def _keep_freed_memory() -> None:
    """Ask glibc to keep large freed blocks for the next step, as torch's CUDA allocator does.

    By default it hands them back to the kernel and faults every page in again: about 6 % of a small model's step.
    """
    _tune_malloc(mmap_threshold=1 << 30, trim_threshold=-1)  # never trim


def return_freed_memory() -> None:
    """Undo that: a process that goes through tensors of all sizes once would keep holes the size of them all."""
    _tune_malloc(mmap_threshold=1 << 20, trim_threshold=1 << 20)


def _tune_malloc(*, mmap_threshold: int, trim_threshold: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, mmap_threshold)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, trim_threshold)  # M_TRIM_THRESHOLD


class _Event(torch.cpu.Event):
    """A CUDA event on a device whose work is done when the call returns."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


class _CpuStream(torch.cpu.Stream):
    """A CUDA stream on a device that has one order of work."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def record_event(self, event: _Event | None = None) -> _Event:  # type: ignore[override]
        """Return ``event``, or a new one (``torch.cpu.Stream`` returns None)."""
        return event or _Event()


def _streams_and_devices() -> None:
    the_stream = _CpuStream()
    cuda: Any = torch.cuda
    cuda.current_device = lambda: "cpu"
    cuda.current_stream = lambda device=None: the_stream
    cuda.default_stream = lambda device=None: the_stream
    cuda.device_count = lambda: 1
    cuda.set_device = lambda device: None
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.set_stream = lambda stream: None
    cuda.synchronize = lambda device=None: None
    cuda.Stream = _CpuStream
    cuda.Event = _Event


def _random_state() -> None:
    generator = torch.default_generator

    def get_rng_state(device: Any = "cuda") -> torch.Tensor:
        return generator.get_state()

    def set_rng_state(state: torch.Tensor, device: Any = "cuda") -> None:
        generator.set_state(state)

    def run_now(call: Callable[[], None], **_: Any) -> None:
        call()

    cuda: Any = torch.cuda
    cuda.default_generators = {"cpu": generator, 0: generator}  # indexed with current_device()
    cuda.manual_seed = lambda seed: generator.manual_seed(seed)
    cuda._lazy_call = run_now
    for module in (cuda, cuda.random):
        module.get_rng_state = get_rng_state
        module.set_rng_state = set_rng_state
    # Its tracker of random states warns whenever the CPU's changes while it has switched the device's: they are one.
    tracker = logging.getLogger("megatron.core.tensor_parallel.random")
    tracker.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _factories() -> None:
    with torch.device("meta"):
        # A device context knows factories by identity and looks them up once: let it see the plain ones, or
        # `with torch.device("meta")` would have no effect on what is replaced here.
        torch.empty(0)
    for name in ("empty", "empty_like", "ones", "tensor", "zeros"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap a tensor factory: ``device="cuda"`` means the CPU, and memory is not pinned."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _tensor_methods() -> None:
    plain_type = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Megatron's optimizers sort parameters by the name of their type, and know the CUDA names only.
        if args or kwargs:
            return plain_type(self, *args, **kwargs)
        return plain_type(self).replace("torch.", "torch.cuda.")

    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]


def keep_python_functions() -> None:
    """Let Megatron's ``jit_fuser`` keep plain functions: compiling them on a CPU takes minutes and gains nothing.

    Also for a GPU machine without a C compiler, which torch.compile needs.
    """
    compile_ = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        import megatron.core.jit  # noqa: F401, PLC0415  (takes torch.compile when it is imported)
    finally:
        torch.compile = compile_


def _slips_of_megatron() -> None:
    """Mend what only shows without Transformer Engine: a default of False that is read as "fp8 is on"."""
    import megatron.core.tensor_parallel.random as random  # noqa: PLC0415

    plain_init = random.CheckpointWithoutOutput.__init__

    def init(self: Any, fp8: Any = None) -> None:
        plain_init(self, fp8 or None)

    random.CheckpointWithoutOutput.__init__ = init


def _quick_maximum() -> None:
    """Let the loss over a vocabulary take its maximum alone: to find the place of each as well takes longer."""
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy  # noqa: PLC0415

    def calculate_logits_max(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits.float()
        return logits, logits.amax(dim=-1)

    VocabParallelCrossEntropy.calculate_logits_max = staticmethod(calculate_logits_max)


def _collectives_of_one() -> None:
    """Skip the distributed optimizer's collectives over one rank, whose input and output are the same memory.

    NCCL returns at once; gloo copies the whole gradient and parameter buffers several times over.
    """
    from megatron.core.distributed import param_and_grad_buffer as buffers  # noqa: PLC0415

    def skipping(collective: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(collective)
        def call(output: torch.Tensor, data: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            same = output.data_ptr() == data.data_ptr() and output.shape == data.shape
            if same and kwargs["group"].size() == 1 and not kwargs.get("async_op"):
                return None
            return collective(output, data, *args, **kwargs)

        return call

    buffers.dist_reduce_scatter_func = skipping(buffers.dist_reduce_scatter_func)
    buffers.dist_all_gather_func = skipping(buffers.dist_all_gather_func)


def _one_device_of_gloo() -> None:
    """Let all groups of gloo in a process share one device.

    By itself each makes its own, with a thread that wakes a hundred times a second as long as the process lives where
    something holds the group. Megatron-Core makes some twenty groups a rank: a twentieth of a core for each.
    """
    from torch.distributed import distributed_c10d as c10d  # noqa: PLC0415

    plain: Any = c10d.ProcessGroupGloo
    if isinstance(plain, _SharingDevice):
        return

    # Called by torch for each group, and asked for as a class.
    c10d.ProcessGroupGloo = _SharingDevice("ProcessGroupGloo", (), {"plain": plain})  # type: ignore[assignment, misc]


class _SharingDevice(type):
    """Stands for gloo's class of groups, and makes them on the devices of this process."""

    plain: Any

    def __call__(cls, store: Any, rank: int, size: int, timeout: Any = None) -> Any:
        """Return a group of gloo."""
        options = cls.plain._Options()
        # A fork has none of the threads of its parent.
        options._devices = _devices(os.getpid(), os.environ.get("GLOO_SOCKET_IFNAME", ""), cls.plain)
        options._threads = 2 * len(options._devices)  # as torch has it
        if timeout is not None:
            options._timeout = timeout
        return cls.plain(store, rank, size, options)

    def __instancecheck__(cls, one: object) -> bool:
        """Whether it is a group of gloo."""
        return isinstance(one, cls.plain)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.plain, name)


@functools.cache
def _devices(_process: int, interfaces: str, gloo: Any) -> list[Any]:
    """Return a device for each of the interfaces of GLOO_SOCKET_IFNAME, or the default, as torch does."""
    if not interfaces:
        return [gloo.create_default_device()]
    return [gloo.create_device(interface=one) for one in interfaces.split(",")]
