"""Names of the connector's weights in published checkpoints."""

from __future__ import annotations

from megavlm.weights.rules import Table, both

PATCH_MERGER = Table(
    part="connector",
    rest=(*both("norm", "ln_q"), *both("linear_1", "mlp.0"), *both("linear_2", "mlp.2")),
    prefix="merger.",
)
"""Qwen2-VL's and Qwen2.5-VL's."""
