"""The cost of MiniGemini's connector: see :class:`megavlm.architectures.cost.ConnectorCost`."""

from __future__ import annotations

from megavlm.architectures.connectors.patch_mining.config import places, widths
from megavlm.architectures.cost import Kernels, Parameter, Pictures, Work
from megavlm.architectures.stack import stack_kept, stack_parameters, stack_work
from megavlm.config.schema import ModelConfig

_MOMENTS = 8
"""Bytes that a norm keeps of a position beside its input: mean and deviation, in fp32."""


def parameters(model: ModelConfig, tensor: int) -> list[Parameter]:
    """Return the parameters on one rank."""
    low, high = model.vision.feature_sizes
    sizes = [low, *[high // places(model)] * 2]
    shapes = [size for size in sizes for _ in range(2)]
    shapes += [one for size in sizes for one in (size * low // tensor, low // tensor)]
    return [Parameter(elements) for elements in shapes + stack_parameters(widths(model), tensor)]


def work(model: ModelConfig, pictures: Pictures) -> Work:
    """Return the operations of a forward pass."""
    low, high = model.vision.feature_sizes
    each = low * low + 2 * high * low + 2 * places(model) * low
    return Work(2 * pictures.patches * each + stack_work(widths(model), pictures.patches))


def kept(model: ModelConfig, tensor: int, pictures: Pictures, kernels: Kernels, *, learns: bool) -> float:
    """Return the bytes that it keeps."""
    low, high = model.vision.feature_sizes
    count, own, b = places(model), low // tensor, kernels.number_bytes
    # Inputs of the norms and of the linear layers behind them; queries, keys (scaled) and values; the weights; the MLP.
    numbers = low + high + (low + 2 * high) * int(learns) + own + 2 * count * own + count
    numbers += stack_kept(widths(model), tensor, learns=learns)
    return pictures.patches * (numbers * b + _MOMENTS * (1 + 2 * count))
