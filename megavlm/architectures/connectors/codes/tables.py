"""Names of its weights in published checkpoints: it has none."""

from __future__ import annotations

from megavlm.weights.rules import Table

NO_CONNECTOR = Table(part="connector")
"""No tensor."""
