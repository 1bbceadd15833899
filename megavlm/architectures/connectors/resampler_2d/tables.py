"""Names of the resampler's weights in published checkpoints."""

from __future__ import annotations

from megavlm.architectures.connectors.resampler.tables import resampler_table

MINICPM_RESAMPLER = resampler_table("resampler.")
"""MiniCPM-V's."""
