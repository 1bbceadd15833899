"""The cost of no connector: see :class:`megavlm.architectures.cost.ConnectorCost`."""

from __future__ import annotations

from megavlm.architectures.cost import Kernels, Parameter, Pictures, Work
from megavlm.config.schema import ModelConfig


def parameters(model: ModelConfig, tensor: int) -> list[Parameter]:
    """Return none."""
    return []


def work(model: ModelConfig, pictures: Pictures) -> Work:
    """Return nothing."""
    return Work(0)


def kept(model: ModelConfig, tensor: int, pictures: Pictures, kernels: Kernels, *, learns: bool) -> float:
    """Return nothing."""
    return 0.0
