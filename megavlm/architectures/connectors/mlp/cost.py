"""The cost of linear layers on every patch: see :class:`megavlm.architectures.cost.ConnectorCost`."""

from __future__ import annotations

from megavlm.architectures.connectors.mlp.config import MLPConfig, widths
from megavlm.architectures.cost import Kernels, Parameter, Pictures, Work
from megavlm.architectures.stack import stack_kept, stack_parameters, stack_work
from megavlm.config.schema import ModelConfig


def _tokens(model: ModelConfig, pictures: Pictures) -> float:
    """Return the features that go through the layers."""
    assert isinstance(model.connector, MLPConfig)
    return pictures.patches - pictures.count * int(model.connector.drop_first_feature)


def parameters(model: ModelConfig, tensor: int) -> list[Parameter]:
    """Return the parameters on one rank."""
    return [Parameter(elements) for elements in stack_parameters(widths(model), tensor)]


def work(model: ModelConfig, pictures: Pictures) -> Work:
    """Return the operations of a forward pass."""
    return Work(stack_work(widths(model), _tokens(model, pictures)))


def kept(model: ModelConfig, tensor: int, pictures: Pictures, kernels: Kernels, *, learns: bool) -> float:
    """Return the bytes that it keeps: its input, and what lies around each activation."""
    return _tokens(model, pictures) * kernels.number_bytes * stack_kept(widths(model), tensor, learns=learns)
