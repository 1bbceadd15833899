"""Connectors between tower and language model. One line here and one module with ``build`` add another."""

from megavlm.models.registry import CONNECTORS

CONNECTORS.register("resampler", "megavlm.models.connectors.resampler", num_queries=256, head_dim=128)
CONNECTORS.register("linear", "megavlm.models.connectors.mlp")
CONNECTORS.register("mlp<N>x_gelu", "megavlm.models.connectors.mlp")
