"""Names of the connectors' weights in published checkpoints."""

from __future__ import annotations

from megavlm.weights.rules import TRANSPOSE, Table, both, row

MINIGPT_PROJECTION = Table(part="connector", rest=both("layers.0", "llama_proj"))
"""MiniGPT-v2's one layer."""

GEMMA3_PROJECTOR = Table(
    part="connector",
    rest=(
        row("norm.weight", "mm_soft_emb_norm.weight"),
        row("layers.0.weight", "mm_input_projection_weight", TRANSPOSE),
    ),
    prefix="multi_modal_projector.",
)
"""Gemma 3's, as Transformers calls it."""

IDEFICS3_CONNECTOR = Table(
    part="connector", rest=(row("layers.0.weight", "modality_projection.proj.weight"),), prefix="model.connector."
)
"""Idefics3's and SmolVLM's."""
