"""The cost of GLM-4.1V's connector: see :class:`megavlm.architectures.cost.ConnectorCost`."""

from __future__ import annotations

from megavlm.architectures.blocks import width_of
from megavlm.architectures.cost import Kernels, Parameter, Pictures, Work
from megavlm.config.schema import ModelConfig


def _tokens(model: ModelConfig, pictures: Pictures) -> float:
    return pictures.patches / int(model.connector.merge_size) ** 2


def parameters(model: ModelConfig, tensor: int) -> list[Parameter]:
    """Return the parameters on one rank."""
    embed, ffn = model.language.hidden_size, int(model.connector.ffn_hidden_size)
    convolution = [width_of(model) * embed // tensor, embed // tensor]
    shapes = [*convolution, embed * embed // tensor, embed, embed, *[embed * ffn // tensor] * 3]
    return [Parameter(elements) for elements in shapes]


def work(model: ModelConfig, pictures: Pictures) -> Work:
    """Return the operations of a forward pass."""
    embed, ffn = model.language.hidden_size, int(model.connector.ffn_hidden_size)
    return Work(2 * _tokens(model, pictures) * embed * (width_of(model) + embed + 3 * ffn))


def kept(model: ModelConfig, tensor: int, pictures: Pictures, kernels: Kernels, *, learns: bool) -> float:
    """Return the bytes that it keeps: inputs of the linear layers if it learns, of norm and activations anyhow."""
    embed, ffn = model.language.hidden_size, int(model.connector.ffn_hidden_size)
    # Norm and GELU keep their inputs, the gate its own, what comes of it, and the other half.
    always = 2 * embed + 3 * ffn // tensor
    # Inputs of the convolution, of the layer behind it, of the MLP, and of its last layer.
    linear = width_of(model) + embed // tensor + embed + ffn // tensor
    return _tokens(model, pictures) * kernels.number_bytes * (always + linear * int(learns))
