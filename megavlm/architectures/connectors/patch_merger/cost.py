"""The cost of Qwen2-VL's connector: see :class:`megavlm.architectures.cost.ConnectorCost`."""

from __future__ import annotations

from megavlm.architectures.blocks import width_of
from megavlm.architectures.connectors.patch_merger.config import norm_width
from megavlm.architectures.cost import Kernels, Parameter, Pictures, Work
from megavlm.config.schema import ModelConfig


def _tokens(model: ModelConfig, pictures: Pictures) -> float:
    return pictures.patches / int(model.connector.merge_size) ** 2


def parameters(model: ModelConfig, tensor: int) -> list[Parameter]:
    """Return the parameters on one rank."""
    width, hidden, own = width_of(model), model.language.hidden_size, norm_width(model)
    norm = [own] if model.connector.normalization == "RMSNorm" else [own, own]
    shapes = [*norm, width * width // tensor, width // tensor, width * hidden // tensor, hidden]
    return [Parameter(elements) for elements in shapes]


def work(model: ModelConfig, pictures: Pictures) -> Work:
    """Return the operations of a forward pass."""
    width = width_of(model)
    return Work(2 * _tokens(model, pictures) * width * (width + model.language.hidden_size))


def kept(model: ModelConfig, tensor: int, pictures: Pictures, kernels: Kernels, *, learns: bool) -> float:
    """Return the bytes that it keeps: inputs of the norm and of the linear layers, what lies around the activation."""
    tokens, b, width = _tokens(model, pictures), kernels.number_bytes, width_of(model)
    # The norm keeps its input (an RMSNorm in fp32, and what its weight multiplies, if that learns), the first layer its
    # own if it learns; the second has the activation's.
    norm = 4 + b * int(learns) if model.connector.normalization == "RMSNorm" else b
    return tokens * width * (norm + b * int(learns)) + tokens * width // tensor * b * (1 + int(learns))
