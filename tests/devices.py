"""A device that is not there: on the CPU, tensors remember which device they were meant for, and may not be mixed.

:func:`pretended_device` makes "cuda" mean ``cpu:0``, a name that torch keeps apart from ``cpu`` wherever a device is
asked for, and has each tensor's storage remember it. An operation on a tensor of the device and one of the host raises
:class:`WrongDevice` as CUDA would, and so do ``numpy()`` of one of the device, and collectives of one of the host.

What this cannot see: code that asks ``is_cuda``, ``device.type`` or ``has_cuda()`` takes the CPU's branch; Transformer
Engine's and Triton's kernels; other threads; what a backward pass makes on the host by name; moves back to the host
that C++ makes of its own; a node's second GPU.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from megavlm.parallel import device as own

DEVICE = torch.device("cpu", 0)
"""What "cuda" means."""
_HOST = torch.device("cpu")
_DEVICE_OF = torch.Tensor.device.__get__  # type: ignore[attr-defined]
aten = torch.ops.aten
# Between devices by their nature; and indices may lie on the host.
_MOVES = {aten.copy_.default, aten._to_copy.default, aten.set_.source_Tensor, aten._foreach_copy_.default}
_INDEXED = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}  # fmt: skip


class WrongDevice(RuntimeError):  # noqa: N818 - what torch's own RuntimeError says
    """Tensors of two devices met, or one was where it cannot be."""


class _Memory:
    """The storages that are on the device."""

    def __init__(self) -> None:
        # Weak references keep an address from being used again, so that it names one storage for good.
        self.storages: dict[int, StorageWeakRef] = {}

    def add(self, tensor: torch.Tensor) -> None:
        reference = StorageWeakRef(tensor.untyped_storage())
        self.storages.setdefault(reference.cdata, reference)

    def has(self, tensor: torch.Tensor) -> bool:
        return StorageWeakRef(tensor.untyped_storage()).cdata in self.storages

    def drop(self, tensor: torch.Tensor) -> None:
        self.storages.pop(StorageWeakRef(tensor.untyped_storage()).cdata, None)


def _is_device(device: Any) -> bool:
    if device is None or isinstance(device, int):
        return device is not None
    name = str(device)
    return name.startswith("cuda") or name == "cpu:0"


def _plain(tensor: Any) -> bool:
    if not isinstance(tensor, torch.Tensor) or isinstance(tensor, ShardedTensor):
        return False
    return tensor.layout is torch.strided and not tensor.is_meta


class _Operations(TorchDispatchMode):
    """Checks operations, and passes on where their inputs are."""

    def __init__(self, memory: _Memory) -> None:
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if _plain(t)]
        asked = kwargs.get("device")
        there = [t for t in tensors if self.memory.has(t)]
        if func.namespace == "c10d":
            self._check_collective(func, tensors)
        elif there and func not in _MOVES:
            checked = [args[0], *args[2:]] if func in _INDEXED else [args, kwargs]
            for other in pytree.tree_leaves(checked):
                if _plain(other) and other.dim() and not self.memory.has(other):
                    raise WrongDevice(f"{func}: {_say(other)} on the host meets {_say(there[0])} on the device")
        results = func(*args, **kwargs)
        # What C++ asks for of its own names the CPU, also for tensors of the device: what there is decides.
        if func in (aten.copy_.default, aten._foreach_copy_.default, aten.set_.source_Tensor):
            on_device = False  # as the target is
        else:
            # In a backward pass nobody's requests are seen, and what torch fills a gap with is as the gradients are.
            fills = not tensors and asked is not None and torch._C._current_graph_task_id() != -1
            on_device = _is_device(asked) or bool(there) or fills
        if on_device and func.namespace != "c10d":
            for result in pytree.tree_leaves(results):
                if _plain(result):
                    self.memory.add(result)
        return results

    def _check_collective(self, func: Any, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            if not self.memory.has(tensor) and not _of_objects():
                raise WrongDevice(f"{func}: {_say(tensor)} on the host, where NCCL takes those of the device")


def _of_objects() -> bool:
    """Whether torch sends a Python object, for which it takes the tensors that the back end needs."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name.endswith(("_object", "_object_list", "barrier")):
            return True
        frame = frame.f_back
    return False


class _Requests(TorchFunctionMode):
    """Translates what is asked of tensors: where they are, to go elsewhere, to be read."""

    def __init__(self, memory: _Memory) -> None:
        super().__init__()
        self.memory = memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == _DEVICE_OF:
            return DEVICE if _plain(args[0]) and self.memory.has(args[0]) else func(*args)
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and self.memory.has(args[0]):
            raise WrongDevice(f"numpy() of {_say(args[0])} on the device; call .cpu() first")
        if func is torch.Tensor.to:
            return self._to(args[0], args[1:], kwargs)
        if func is torch.Tensor.cpu:
            return self._moved(args[0], _HOST)
        if kwargs.get("device") is not None and str(kwargs["device"]).startswith("cuda"):
            kwargs["device"] = DEVICE
        result = func(*args, **kwargs)
        if func is torch._C._nn.pad_sequence and any(self.memory.has(one) for one in args[0]):
            self.memory.add(result)  # which C++ makes on the CPU, and then copies into
        if kwargs.get("device") is not None and _plain(result):  # torch.tensor makes it without an operation
            (self.memory.add if _is_device(kwargs["device"]) else self.memory.drop)(result)
        return result

    def _to(self, tensor: torch.Tensor, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        kwargs.pop("non_blocking", None)
        rest, target = [], kwargs.pop("device", None)
        for one in args:
            if isinstance(one, torch.device | str):
                target = one
            elif isinstance(one, torch.Tensor):
                target = DEVICE if self.memory.has(one) else one.device
                rest.append(one.dtype)
            elif isinstance(one, bool) and (rest or target is not None):
                pass  # non_blocking; a copy is made where it must be
            else:
                rest.append(one)
        moved = tensor if target is None else self._moved(tensor, target)
        return torch.Tensor.to(moved, *rest, **kwargs) if rest or kwargs else moved

    def _moved(self, tensor: torch.Tensor, target: Any) -> torch.Tensor:
        if not _plain(tensor) or torch.device(str(target).replace("cuda", "cpu")).type != "cpu":
            return torch.Tensor.to(tensor, target)
        if self.memory.has(tensor) == _is_device(target):
            return tensor
        moved = torch.ops.aten._to_copy(tensor, device=DEVICE if _is_device(target) else _HOST)
        (self.memory.add if _is_device(target) else self.memory.drop)(moved)
        return moved


def _say(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _on_device(factory: Any) -> Any:
    """Wrap a factory of the CPU layer, for which "cuda" is the CPU."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = DEVICE
        return factory(*args, **kwargs)

    return make


def _without_requests(method: Any) -> Any:
    """Wrap a method that the CPU layer has replaced, which would come by twice."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return method(*args, **kwargs)

    return call


def _forget_cached_tensors() -> None:
    """Empty what functions remember: tensors of before are not on the device, and those of the device are not after."""
    for module in [m for name, m in sys.modules.items() if name.startswith("megavlm.")]:
        for value in list(vars(module).values()):
            if isinstance(value, functools._lru_cache_wrapper):
                value.cache_clear()


class Pretended:
    """What :func:`pretended_device` gives.

    Args:
        memory: of the device.
    """

    def __init__(self, memory: _Memory) -> None:
        self._memory = memory

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on the device."""
        return self._memory.has(tensor)


@contextlib.contextmanager
def pretended_device() -> Iterator[Pretended]:
    """Pretend that this process computes on a GPU; the calling thread's operations are checked."""
    memory = _Memory()
    assert not torch.cuda.is_available()
    with contextlib.ExitStack() as stack:
        replace = lambda target, name, value: stack.enter_context(mock.patch.object(target, name, value))  # noqa: E731
        plain = own.local_device
        for module in [m for name, m in sys.modules.items() if name.startswith("megavlm.")]:
            if getattr(module, "local_device", None) is plain:
                replace(module, "local_device", lambda: DEVICE)
        replace(torch.cuda, "current_device", lambda: DEVICE)
        replace(torch.cuda, "default_generators", {**torch.cuda.default_generators, DEVICE: torch.default_generator})
        for name in ("empty", "empty_like", "ones", "tensor", "zeros"):
            replace(torch, name, _on_device(getattr(torch, name)))
        replace(torch.Tensor, "cuda", lambda self, *_, **__: self.to(DEVICE))
        replace(torch.Tensor, "type", _without_requests(torch.Tensor.type))
        stack.enter_context(_Operations(memory))
        stack.enter_context(_Requests(memory))
        _forget_cached_tensors()
        stack.callback(_forget_cached_tensors)
        yield Pretended(memory)
