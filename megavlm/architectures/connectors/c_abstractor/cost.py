"""The cost of the C-Abstractor: see :class:`megavlm.architectures.cost.ConnectorCost`."""

from __future__ import annotations

from megavlm.architectures.connectors.c_abstractor.config import blocks, own, widths
from megavlm.architectures.cost import Kernels, Parameter, Pictures, Work
from megavlm.architectures.stack import stack_kept, stack_parameters, stack_work
from megavlm.config.schema import ModelConfig

_MOMENTS = 8
"""Bytes that a norm keeps of a patch beside its input: mean and deviation, in fp32."""


def _tokens(model: ModelConfig, pictures: Pictures) -> float:
    return pictures.patches * model.tokens_per_view / model.vision.patches_per_image


def parameters(model: ModelConfig, tensor: int) -> list[Parameter]:
    """Return the parameters on one rank; every rank has the depthwise convolutions and the norms whole."""
    connector, width = own(model), own(model).hidden_size
    shapes = [model.vision.patches_per_image * model.vision.feature_size] * int(connector.position_embedding)
    norm = [width, width]
    for size_in, inside, _ in blocks(model):
        gate = [width * inside // tensor, inside // tensor, inside * width // tensor, width]
        shapes += [size_in * width // tensor, *norm, 9 * width, *norm, *gate, width * width // tensor, *norm]
        if size_in != width:
            shapes += [size_in * width // tensor, *norm]
    return [Parameter(elements) for elements in [*shapes, *stack_parameters(widths(model), tensor)]]


def work(model: ModelConfig, pictures: Pictures) -> Work:
    """Return the operations of a forward pass; every rank makes the depthwise convolutions whole."""
    width, tokens = own(model).hidden_size, _tokens(model, pictures)
    products, whole = stack_work(widths(model), tokens), 0.0
    for size_in, inside, ahead in blocks(model):
        patches = pictures.patches if ahead else tokens
        into = size_in * width * (1 + int(size_in != width))
        products += 2 * patches * (into + width * width) + 2 * pictures.count * 2 * width * inside
        whole += 2 * patches * 9 * width
    return Work(products, whole=whole)


def kept(model: ModelConfig, tensor: int, pictures: Pictures, kernels: Kernels, *, learns: bool) -> float:
    """Return the bytes that it keeps."""
    width, tokens, b = own(model).hidden_size, _tokens(model, pictures), kernels.number_bytes
    # Inputs of pooling and of the linear layers.
    total = b * (pictures.patches * widths(model)[0] + tokens * stack_kept(widths(model), tensor, learns=learns))
    for size_in, inside, ahead in blocks(model):
        patches, shortcut = pictures.patches if ahead else tokens, int(size_in != width)
        # Inputs of three norms, of what follows two of them, of the depthwise convolution, of the gate and of the last
        # activation; of the 1 x 1 convolutions, if they learn.
        total += b * patches * ((8 + shortcut) * width + (width + size_in) * int(learns))
        total += patches * (3 + shortcut) * _MOMENTS
        total += b * pictures.count * (width + inside // tensor) * (1 + int(learns))
    return total
