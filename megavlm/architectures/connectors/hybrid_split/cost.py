"""The cost of a connector that joins two towers by halves: see :class:`megavlm.architectures.cost.ConnectorCost`."""

from __future__ import annotations

from megavlm.architectures.cost import Kernels, Parameter, Pictures, Work
from megavlm.config.schema import ModelConfig


def parameters(model: ModelConfig, tensor: int) -> list[Parameter]:
    """Return the parameters on one rank."""
    embed, shapes = model.language.hidden_size, []
    behind = [(embed, embed)] if model.connector.output_layer else []
    for size, out in (*((size, embed // 2) for size in model.vision.feature_sizes), *behind):
        shapes += [size * out // tensor, out // tensor]
    return [Parameter(elements) for elements in shapes]


def work(model: ModelConfig, pictures: Pictures) -> Work:
    """Return the operations of a forward pass."""
    embed = model.language.hidden_size
    behind = embed**2 if model.connector.output_layer else 0
    return Work(2 * pictures.patches * (sum(model.vision.feature_sizes) * embed // 2 + behind))


def kept(model: ModelConfig, tensor: int, pictures: Pictures, kernels: Kernels, *, learns: bool) -> float:
    """Return the bytes that it keeps: both halves of its input, and what lies around the activation, gathered."""
    embed = model.language.hidden_size if model.connector.output_layer else 0
    numbers = embed + (sum(model.vision.feature_sizes) + embed) * int(learns)
    return pictures.patches * numbers * kernels.number_bytes
