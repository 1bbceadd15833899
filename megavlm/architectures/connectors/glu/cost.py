"""The cost of CogVLM's connector: see :class:`megavlm.architectures.cost.ConnectorCost`."""

from __future__ import annotations

from megavlm.architectures.connectors.glu.config import ENDS, own
from megavlm.architectures.cost import Kernels, Parameter, Pictures, Work
from megavlm.config.schema import ModelConfig


def parameters(model: ModelConfig, tensor: int) -> list[Parameter]:
    """Return the parameters on one rank."""
    width, embed, ffn = model.vision.feature_size, model.language.hidden_size, own(model).ffn_hidden_size
    shapes = [width * embed // tensor, embed, embed, *[embed * ffn // tensor] * 3, *[embed] * ENDS]
    return [Parameter(elements) for elements in shapes]


def work(model: ModelConfig, pictures: Pictures) -> Work:
    """Return the operations of a forward pass."""
    embed = model.language.hidden_size
    return Work(2 * pictures.patches * embed * (model.vision.feature_size + 3 * own(model).ffn_hidden_size))


def kept(model: ModelConfig, tensor: int, pictures: Pictures, kernels: Kernels, *, learns: bool) -> float:
    """Return the bytes that it keeps: inputs of the linear layers if it learns, of norm and activations anyhow."""
    embed, ffn = model.language.hidden_size, own(model).ffn_hidden_size
    # Norm and GELU keep their inputs, the gate its own, what comes of it, and the other half.
    always = 2 * embed + 3 * ffn // tensor
    # Inputs of the first layer, of the MLP, and of its last layer.
    linear = model.vision.feature_size + embed + ffn // tensor
    return pictures.patches * kernels.number_bytes * (always + linear * int(learns))
