"""Names of DeepSeek-VL-7B's connector in published checkpoints."""

from __future__ import annotations

from megavlm.weights.rules import Table, both

HYBRID_ALIGNER = Table(
    part="connector",
    rest=(*both("low", "vision_proj"), *both("high", "high_res_vision_proj"), *both("proj", "proj")),
    prefix="model.aligner.",
)
"""As Transformers calls its layers."""
