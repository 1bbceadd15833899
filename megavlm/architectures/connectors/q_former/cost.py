"""The cost of the Q-Former: see :class:`megavlm.architectures.cost.ConnectorCost`."""

from __future__ import annotations

from megavlm.architectures.connectors.q_former.config import own
from megavlm.architectures.cost import Kernels, Parameter, Pictures, Work
from megavlm.architectures.stack import stack_parameters, stack_work
from megavlm.config.schema import ModelConfig

_MOMENTS = 8
"""Bytes that a norm keeps of a query beside its input: mean and deviation, in fp32."""


def _looking(model: ModelConfig) -> int:
    """Return the layers that look at the features."""
    return sum(own(model).looks(layer) for layer in range(own(model).num_layers))


def _features(model: ModelConfig, pictures: Pictures) -> float:
    """Return the features of the pictures."""
    return pictures.patches + pictures.count * model.vision.class_features


def parameters(model: ModelConfig, tensor: int) -> list[Parameter]:
    """Return the parameters on one rank."""
    connector, seen = own(model), model.vision.feature_size
    width, ffn = connector.hidden_size, connector.ffn_hidden_size
    norm = [width, width]

    def attention(into: int) -> list[int]:
        shapes = [width * width // tensor, width // tensor, *[into * width // tensor, width // tensor] * 2]
        return [*shapes, width * width // tensor, width, *norm]

    mlp = [width * ffn // tensor, ffn // tensor, ffn * width // tensor, width, *norm]
    shapes = [connector.num_queries * width, *norm]
    for layer in range(connector.num_layers):
        shapes += attention(width) + (attention(seen) if connector.looks(layer) else []) + mlp
    fixed = connector.trained == "projection"
    last = stack_parameters(connector.projected(model.language.hidden_size), tensor)
    return [*(Parameter(elements, fixed=fixed) for elements in shapes), *(Parameter(elements) for elements in last)]


def work(model: ModelConfig, pictures: Pictures) -> Work:
    """Return the operations of a forward pass.

    Without what is done once for all pictures: the first layer's attention of the queries to each other.
    """
    connector, features, looking = own(model), _features(model, pictures), _looking(model)
    queries, width, layers = connector.num_queries, connector.hidden_size, connector.num_layers
    tokens, square = pictures.count * queries, width * width
    products = 2 * tokens * ((layers - 1) * 4 * square + layers * 2 * width * connector.ffn_hidden_size)
    # Of those that look: the queries' projection (the first one's once for all), the result's, keys and values.
    products += 2 * tokens * (2 * looking - 1) * square + looking * 2 * features * 2 * model.vision.feature_size * width
    products += stack_work(connector.projected(model.language.hidden_size), tokens)
    attention = 4 * width * queries * ((layers - 1) * tokens + looking * features)
    return Work(products=products, attention=attention)


def kept(model: ModelConfig, tensor: int, pictures: Pictures, kernels: Kernels, *, learns: bool) -> float:
    """Return the bytes that it keeps."""
    connector, features, b = own(model), _features(model, pictures), kernels.number_bytes
    width, ffn, heads = connector.hidden_size, connector.ffn_hidden_size // tensor, connector.num_attention_heads
    part, inside = width // tensor, learns and connector.trained == "all"
    queries = connector.num_queries
    tokens = pictures.count * queries
    # Of a query: the attention's result and its sums of exponentials; input of the norm, and its output if it learns.
    around = part * b + heads // tensor * 4 + width * b * (1 + int(inside)) + _MOMENTS
    itself = 3 * part * b + around
    # Until it looks at pictures, nothing of the first layer is kept unless it learns; then also what was normed first.
    total: float = queries * (itself + width * b + _MOMENTS) * int(inside)
    total += (connector.num_layers - 1) * tokens * itself
    total += _looking(model) * (tokens * (part * b + around) + features * 2 * part * b)
    mlp = ffn * b * (1 + int(inside)) + width * b * (1 + int(inside)) + _MOMENTS
    total += connector.num_layers * tokens * mlp
    # The last norm's output, for the layer behind it; what is looked at, for keys and values.
    total += tokens * width * b * (int(learns) - int(inside))
    total += tokens * (connector.projection_hidden_size or 0) // tensor * b * int(learns)
    return total + features * model.vision.feature_size * b * int(inside)
