"""The cost of InternVL's connector: see :class:`megavlm.architectures.cost.ConnectorCost`."""

from __future__ import annotations

from megavlm.architectures.connectors.pixel_shuffle.config import width_of
from megavlm.architectures.cost import Kernels, Parameter, Pictures, Work
from megavlm.config.schema import ModelConfig


def _tokens(model: ModelConfig, pictures: Pictures) -> float:
    return pictures.patches / int(model.connector.factor) ** 2


def parameters(model: ModelConfig, tensor: int) -> list[Parameter]:
    """Return the parameters on one rank."""
    width, hidden = width_of(model), model.language.hidden_size
    shapes = [width, width, width * hidden // tensor, hidden // tensor, hidden * hidden // tensor, hidden]
    return [Parameter(elements) for elements in shapes]


def work(model: ModelConfig, pictures: Pictures) -> Work:
    """Return the operations of a forward pass."""
    hidden = model.language.hidden_size
    return Work(2 * _tokens(model, pictures) * hidden * (width_of(model) + hidden))


def kept(model: ModelConfig, tensor: int, pictures: Pictures, kernels: Kernels, *, learns: bool) -> float:
    """Return the bytes that it keeps: inputs of the norm and of the linear layers, what lies around the activation."""
    tokens, b = _tokens(model, pictures), kernels.number_bytes
    width, inner = width_of(model), model.language.hidden_size // tensor
    # The norm keeps its input, and the first layer its own if it learns; the second layer's is the activation's result.
    return tokens * width * b * (1 + int(learns)) + tokens * inner * b * (1 + int(learns))
