"""The cost of DeepSeek-VL-7B's connector: see :class:`megavlm.architectures.cost.ConnectorCost`."""

from __future__ import annotations

from megavlm.architectures.cost import Kernels, Parameter, Pictures, Work
from megavlm.config.schema import ModelConfig


def parameters(model: ModelConfig, tensor: int) -> list[Parameter]:
    """Return the parameters on one rank."""
    embed, shapes = model.language.hidden_size, []
    for size, out in (*((size, embed // 2) for size in model.vision.feature_sizes), (embed, embed)):
        shapes += [size * out // tensor, out // tensor]
    return [Parameter(elements) for elements in shapes]


def work(model: ModelConfig, pictures: Pictures) -> Work:
    """Return the operations of a forward pass."""
    embed = model.language.hidden_size
    return Work(2 * pictures.patches * (sum(model.vision.feature_sizes) * embed // 2 + embed**2))


def kept(model: ModelConfig, tensor: int, pictures: Pictures, kernels: Kernels, *, learns: bool) -> float:
    """Return the bytes that it keeps: both halves of its input, and what lies around the activation, gathered."""
    embed = model.language.hidden_size
    numbers = embed + (sum(model.vision.feature_sizes) + embed) * int(learns)
    return pictures.patches * numbers * kernels.number_bytes
