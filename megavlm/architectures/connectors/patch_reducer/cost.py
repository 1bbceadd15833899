"""The cost of connectors of several patches: see :class:`megavlm.architectures.cost.ConnectorCost`."""

from __future__ import annotations

from megavlm.architectures.connectors.patch_reducer.config import own, widths
from megavlm.architectures.cost import Kernels, Parameter, Pictures, Work
from megavlm.architectures.stack import stack_kept, stack_parameters, stack_work
from megavlm.config.schema import ModelConfig


def _tokens(model: ModelConfig, pictures: Pictures) -> float:
    return pictures.patches / own(model).patches


def parameters(model: ModelConfig, tensor: int) -> list[Parameter]:
    """Return the parameters on one rank."""
    connector, sizes = own(model), widths(model)
    norm = {None: 0, "RMSNorm": 1, "LayerNorm": 2}[connector.normalization]
    shapes = [sizes[0]] * norm + stack_parameters(sizes, tensor, bias=connector.add_bias_linear)
    return [Parameter(elements) for elements in shapes]


def work(model: ModelConfig, pictures: Pictures) -> Work:
    """Return the operations of a forward pass."""
    return Work(stack_work(widths(model), _tokens(model, pictures)))


def kept(model: ModelConfig, tensor: int, pictures: Pictures, kernels: Kernels, *, learns: bool) -> float:
    """Return the bytes that it keeps: the norm's input, the linear layers', and what lies around each activation."""
    connector, sizes, b = own(model), widths(model), kernels.number_bytes
    each, once = float(stack_kept(sizes, tensor, learns=learns) * b), 0
    if connector.normalization == "LayerNorm":
        each += sizes[0] * b + 8  # mean and deviation
    elif connector.normalization == "RMSNorm":  # computed in fp32; what is normalised and not yet scaled, if it learns
        zero = connector.layernorm_zero_centered_gamma
        each += sizes[0] * (4 + (4 if zero else b) * int(learns)) + 4
        once = sizes[0] * 4 * int(zero)  # 1 + weight
    return _tokens(model, pictures) * each + once
