"""Rows of families with a Q-Former, a visual expert, or a pair of towers."""

from __future__ import annotations

from typing import Any

from blip2_models import blip2_rows
from cobra_rows import cobra_rows
from cogvlm_rows import cogvlm_rows
from minigemini_rows import minigemini_rows
from minigpt_models import minigpt_rows
from whole import WholeFamily


def fused_rows(header: Any, targets: Any, planned: Any) -> dict[str, WholeFamily]:
    """Return the rows, made of what the others say of recipes, adapters and the planner too."""
    return {
        **minigemini_rows(header, targets, planned),
        **blip2_rows(targets, planned),
        **minigpt_rows(header, planned),
        **cobra_rows(header, planned),
        **cogvlm_rows(header, planned),
    }
