"""The peak of what tensor operations allocate, counted on any device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts the storages that operations inside the block make, from their first sight to their end.

    What was there before, such as weights and gradient buffers, is not counted; ``known`` names such tensors.
    """

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = {id(tensor.untyped_storage()) for tensor in known}
        self._known = known

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor, counts=False)
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor, counts=True)
        return result

    def _watch(self, tensor: torch.Tensor, *, counts: bool) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._seen:
            return
        self._seen.add(id(storage))
        size = storage.nbytes() if counts else 0
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, id(storage), size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
