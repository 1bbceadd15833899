"""Connectors between tower and language model. One line here and one module with ``build`` add another."""

from megavlm.architectures.registry import CONNECTORS

CONNECTORS.register("resampler", "megavlm.architectures.connectors.resampler.build", num_queries=256, head_dim=128)
CONNECTORS.register("linear", "megavlm.architectures.connectors.mlp.build")
CONNECTORS.register("mlp<N>x_gelu", "megavlm.architectures.connectors.mlp.build")
