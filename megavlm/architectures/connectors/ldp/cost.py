"""The cost of MobileVLM's connectors: see :class:`megavlm.architectures.cost.ConnectorCost`."""

from __future__ import annotations

from megavlm.architectures.connectors.ldp.config import own, squeezed
from megavlm.architectures.cost import Kernels, Parameter, Pictures, Work
from megavlm.architectures.stack import stack_kept, stack_parameters, stack_work
from megavlm.config.schema import ModelConfig

_MOMENTS = 8
"""Bytes that a norm keeps of a token beside its input: mean and deviation, in fp32."""


def _widths(model: ModelConfig) -> list[int]:
    return [model.vision.feature_size, model.language.hidden_size, model.language.hidden_size]


def _tokens(model: ModelConfig, pictures: Pictures) -> float:
    return pictures.patches * model.tokens_per_view / model.vision.patches_per_image


def parameters(model: ModelConfig, tensor: int) -> list[Parameter]:
    """Return the parameters on one rank; every rank has the depthwise convolutions and the norms whole."""
    embed = model.language.hidden_size
    shapes, inside = stack_parameters(_widths(model), tensor), squeezed(embed)
    if own(model).version == 1:
        gate = [embed * inside // tensor, inside // tensor, inside * embed // tensor, embed]
        shapes += [9 * embed, embed, embed, *gate, embed * embed // tensor, embed, embed] * 2
    else:
        shapes += [9 * embed, embed]
    return [Parameter(elements) for elements in shapes]


def work(model: ModelConfig, pictures: Pictures) -> Work:
    """Return the operations of a forward pass; every rank makes the depthwise convolutions whole."""
    embed, tokens = model.language.hidden_size, _tokens(model, pictures)
    products = stack_work(_widths(model), pictures.patches)
    if own(model).version == 2:
        return Work(products, whole=2 * tokens * 9 * embed)
    maps = pictures.patches + tokens  # of the first block, and of the second
    gates = 2 * pictures.count * 2 * 2 * embed * squeezed(embed)
    return Work(products + 2 * maps * embed * embed + gates, whole=2 * maps * 9 * embed)


def kept(model: ModelConfig, tensor: int, pictures: Pictures, kernels: Kernels, *, learns: bool) -> float:
    """Return the bytes that it keeps."""
    embed, tokens = model.language.hidden_size, _tokens(model, pictures)
    numbers = pictures.patches * stack_kept(_widths(model), tensor, learns=learns)
    if own(model).version == 2:
        # Inputs of pooling and convolution.
        return kernels.number_bytes * (numbers + (pictures.patches + tokens) * embed)
    total, gate = kernels.number_bytes * numbers, embed * (2 + int(learns)) + squeezed(embed) // tensor
    for before, behind in ((pictures.patches, pictures.patches), (pictures.patches, tokens)):
        # Inputs of the convolution, of its norm, of the activation, of the gate and of the last norm; of the 1 x 1
        # convolution, if it learns.
        total += kernels.number_bytes * embed * (before + behind * (4 + int(learns)))
        total += kernels.number_bytes * pictures.count * gate + behind * 2 * _MOMENTS
    return total
