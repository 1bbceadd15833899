"""Names of the connector's weights in published checkpoints."""

from __future__ import annotations

from megavlm.weights.rules import TWO_AXES, Table, both, row

COGVLM_GLU = Table(
    part="connector",
    rest=(
        row("proj.weight", "linear_proj.linear_proj.weight"),
        *both("norm", "linear_proj.norm1"),
        row("gate.weight", "linear_proj.gate_proj.weight"),
        row("up.weight", "linear_proj.dense_h_to_4h.weight"),
        row("down.weight", "linear_proj.dense_4h_to_h.weight"),
        row("begin", "boi", TWO_AXES),
        row("end", "eoi", TWO_AXES),
    ),
    prefix="model.vision.",
)
"""CogVLM's own."""
