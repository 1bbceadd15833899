"""Names of the connector's weights in published checkpoints."""

from __future__ import annotations

from megavlm.weights.rules import Table, both

PIXEL_SHUFFLE = Table(
    part="connector",
    rest=(*both("norm", "{norm}"), *both("linear_1", "{linear_1}"), *both("linear_2", "{linear_2}")),
)
