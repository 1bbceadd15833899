"""What planner and MFU ask of the connector."""

from __future__ import annotations

from megavlm.architectures.cost import Kernels, Parameter, Pictures, Work
from megavlm.config.schema import ModelConfig


def parameters(model: ModelConfig, tensor: int) -> list[Parameter]:
    """Return each parameter on one rank."""
    width, hidden = model.vision.hidden_size, model.language.hidden_size
    return [Parameter(width * hidden // tensor), Parameter(hidden // tensor)]


def work(model: ModelConfig, pictures: Pictures) -> Work:
    """Return the operations of a forward pass."""
    tokens = pictures.count * model.tokens_per_view
    return Work(2 * tokens * model.vision.hidden_size * model.language.hidden_size)


def kept(model: ModelConfig, tensor: int, pictures: Pictures, kernels: Kernels, *, learns: bool) -> float:
    """Return what is kept: the means."""
    return pictures.count * model.tokens_per_view * model.vision.hidden_size * kernels.number_bytes * int(learns)
