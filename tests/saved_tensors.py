"""Bytes that autograd really keeps for the backward pass, also of a model whose weights are in 4 bits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch

from megavlm.architectures.adapters import frozen_linears
from megavlm.layers.lora import FrozenColumnParallelLinear
from megavlm.layers.nf4 import quantise


class Saved:
    """What was saved; each storage once, and no parameter."""

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self._parameters = {p.untyped_storage().data_ptr() for p in parameters}
        # Held, so that no address is used twice.
        self._tensors: dict[int, torch.Tensor] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take note of a tensor that is saved."""
        address = tensor.untyped_storage().data_ptr()
        if address not in self._parameters:
            self._tensors[address] = tensor
        return tensor

    @property
    def bytes(self) -> int:
        """All of it."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._tensors.values())


@contextlib.contextmanager
def saved_tensors(parameters: Iterable[torch.Tensor]) -> Iterator[Saved]:
    """Count what is saved inside the block."""
    saved = Saved(parameters)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        yield saved


def quantise_random(language: torch.nn.Module) -> None:
    """Give random values to the weights of a language model, on one rank, that are to be in 4 bits."""
    for _, _, linear in frozen_linears(language):
        if linear.quantize:
            weight = torch.randn(linear.output_size, linear.input_size, dtype=linear.config.params_dtype) * 0.02
            column = isinstance(linear, FrozenColumnParallelLinear)
            linear.nf4 = quantise(weight, [(0, weight.shape[0 if column else 1])], transposed=not column)
