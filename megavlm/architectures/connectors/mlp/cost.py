"""The cost of linear layers on every patch: see :class:`megavlm.architectures.cost.ConnectorCost`."""

from __future__ import annotations

from megavlm.architectures.connectors.mlp.config import MLPConfig
from megavlm.architectures.cost import Kernels, Parameter, Pictures, Work
from megavlm.config.schema import ModelConfig


def _sizes(model: ModelConfig) -> tuple[int, int, int]:
    """Return the number of layers, and the widths that they begin and end with."""
    assert isinstance(model.connector, MLPConfig)
    return model.connector.depth, model.vision.feature_size, model.language.hidden_size


def parameters(model: ModelConfig, tensor: int) -> list[Parameter]:
    """Return the parameters on one rank."""
    depth, width, hidden = _sizes(model)
    shapes = []
    for layer in range(depth):
        size_in = width if layer == 0 else hidden
        shapes += [size_in * hidden // tensor, hidden // tensor if layer % 2 == 0 else hidden]
    return [Parameter(elements) for elements in shapes]


def work(model: ModelConfig, pictures: Pictures) -> Work:
    """Return the operations of a forward pass."""
    depth, width, hidden = _sizes(model)
    return Work(2 * pictures.patches * (width * hidden + (depth - 1) * hidden * hidden))


def kept(model: ModelConfig, tensor: int, pictures: Pictures, kernels: Kernels, *, learns: bool) -> float:
    """Return the bytes that it keeps: its input, and what lies around each activation."""
    (depth, width, hidden), b = _sizes(model), kernels.number_bytes
    total = pictures.patches * width * b * int(learns)
    for layer in range(depth - 1):
        inner = hidden // tensor if layer % 2 == 0 else hidden
        total += pictures.patches * inner * b * (1 + int(learns))  # before and after the activation
    return total
