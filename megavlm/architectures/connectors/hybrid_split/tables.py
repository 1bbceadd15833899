"""Names of connectors that join two towers by halves, in published checkpoints."""

from __future__ import annotations

from megavlm.weights.rules import Table, both

HYBRID_ALIGNER = Table(
    part="connector",
    rest=(*both("low", "vision_proj"), *both("high", "high_res_vision_proj"), *both("proj", "proj")),
    prefix="model.aligner.",
)
"""As Transformers calls its layers."""

VARY_PROJECTORS = Table(
    part="connector", rest=(*both("low", "mm_projector"), *both("high", "mm_projector_vary")), prefix="transformer."
)
"""Vary's."""
