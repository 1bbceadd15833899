"""The cost of Qwen-VL's resampler: see :class:`megavlm.architectures.cost.ConnectorCost`."""

from __future__ import annotations

from megavlm.architectures.connectors.resampler.config import ResamplerConfig
from megavlm.architectures.cost import Kernels, Parameter, Pictures, Work
from megavlm.config.schema import ModelConfig


def _sizes(model: ModelConfig) -> tuple[int, int, int, int]:
    """Return queries, width of a head, and the widths of tower and language model."""
    connector = model.connector
    assert isinstance(connector, ResamplerConfig)
    assert connector.num_queries is not None and connector.head_dim is not None  # its rules
    return connector.num_queries, connector.head_dim, model.vision.feature_size, model.language.hidden_size


def parameters(model: ModelConfig, tensor: int) -> list[Parameter]:
    """Return the parameters on one rank, the fixed positions at the end."""
    queries, _, width, hidden = _sizes(model)
    square = hidden * hidden // tensor
    shapes = [queries * hidden] + [hidden] * 6  # the queries; three LayerNorms
    if width != hidden:
        shapes.append(width * hidden // tensor)
    shapes += [square, hidden // tensor] * 3 + [square, hidden, square]
    return [*(Parameter(elements) for elements in shapes), Parameter(queries * hidden, fixed=True)]


def work(model: ModelConfig, pictures: Pictures) -> Work:
    """Return the operations of a forward pass."""
    queries, _, width, hidden = _sizes(model)
    into = 0 if width == hidden else 2 * pictures.patches * width * hidden
    keys_values = 2 * pictures.patches * 2 * hidden * hidden
    # out_proj and proj; the queries themselves are the same for all images and projected once.
    out = pictures.count * 2 * queries * 2 * hidden * hidden
    return Work(products=into + keys_values + out, attention=4 * queries * pictures.patches * hidden)


def kept(model: ModelConfig, tensor: int, pictures: Pictures, kernels: Kernels, *, learns: bool) -> float:
    """Return the bytes that it keeps."""
    (queries, head_dim, width, hidden), b = _sizes(model), kernels.number_bytes
    looking = pictures.count * queries
    features = pictures.patches * width * b * int(learns)
    wide, split = pictures.patches * hidden * b, pictures.patches * hidden // tensor * b
    # ln_kv's input; keys and values, which see it with and without positions.
    total = wide + 2 * split + 2 * wide * int(learns)
    # Queries and result of the attention; ln_post's input and output.
    total += 2 * looking * hidden // tensor * b + looking * hidden * b * (1 + int(learns))
    total += looking * (hidden // head_dim // tensor) * 4
    return total + features * int(width != hidden)
