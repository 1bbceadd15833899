"""How a directory shows that ``megavlm prepare`` made a data set of it."""

from __future__ import annotations

META = ".nv-meta"
"""Directory of a prepared data set that Megatron-Energon's index lies in."""
