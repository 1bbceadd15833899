"""The cost of MiniCPM-V's resampler: see :class:`megavlm.architectures.cost.ConnectorCost`.

What the smaller of several pictures are filled up with is not counted, neither as work nor as memory.
"""

from __future__ import annotations

from megavlm.architectures.connectors.resampler import cost
from megavlm.architectures.connectors.resampler_2d.config import own
from megavlm.architectures.cost import Kernels, Parameter, Pictures, Work
from megavlm.config.schema import ModelConfig

_MOMENTS = 8
"""Bytes that a norm keeps beside its input: mean and deviation, in fp32."""


def parameters(model: ModelConfig, tensor: int) -> list[Parameter]:
    """Return the parameters on one rank, the queries' fixed positions at the end, if they have any."""
    found = cost.parameters(model, tensor)
    return found if own(model).query_positions else [one for one in found if not one.fixed]


def work(model: ModelConfig, pictures: Pictures) -> Work:
    """Return the operations of a forward pass."""
    return cost.work(model, pictures)


def kept(model: ModelConfig, tensor: int, pictures: Pictures, kernels: Kernels, *, learns: bool) -> float:
    """Return the bytes that it keeps."""
    connector, hidden, b = own(model), model.language.hidden_size, kernels.number_bytes
    assert connector.num_queries is not None and connector.head_dim is not None  # its rules
    queries, width = connector.num_queries, model.vision.feature_size
    looking, wide = pictures.count * queries, pictures.patches * hidden * b
    features = pictures.patches * width * b * int(learns and width != hidden)
    # ln_kv's input; keys and values, which see it with and without positions.
    total = features + wide + 2 * wide // tensor + 2 * wide * int(learns) + pictures.patches * _MOMENTS
    # Queries, the same for all pictures; the attention's result, as it is and as out_proj takes it.
    total += queries * hidden * b * int(learns) + (queries + looking * (1 + int(learns))) * hidden // tensor * b
    # ln_post's input and output.
    total += looking * hidden * b * (1 + int(learns)) + looking * _MOMENTS
    return total + looking * (hidden // connector.head_dim // tensor) * 4
