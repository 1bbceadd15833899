"""Names of MiniGemini's connector in published checkpoints."""

from __future__ import annotations

import dataclasses

from megavlm.architectures.connectors.mlp.tables import SEQUENTIAL_PROJECTOR
from megavlm.weights.rules import Table, both

_PARTS = {"query": "query", "key": "aux", "value": "val"}

MINING_PROJECTOR: Table = dataclasses.replace(
    SEQUENTIAL_PROJECTOR,
    rest=(
        *(one for ours, theirs in _PARTS.items() for one in both(f"norms.{ours}", f"vlm_uni_{theirs}_projector.0")),
        *(one for ours, theirs in _PARTS.items() for one in both(f"linears.{ours}", f"vlm_uni_{theirs}_projector.1")),
        *(one for n in range(99) for one in both(f"layers.{n}", f"mm_projector.{2 * n}")),
    ),
    prefix="model.",
)
"""As its authors call its layers."""
