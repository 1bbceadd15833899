"""Rows of families with a Q-Former, a visual expert, a pair of towers, or pictures that are tokens."""

from __future__ import annotations

from typing import Any

from blip2_models import blip2_rows
from chameleon_rows import chameleon_rows
from cobra_rows import cobra_rows
from cogvlm_rows import cogagent_row, cogvlm_rows
from minigemini_rows import minigemini_rows
from minigpt_models import minigpt_rows
from tinygpt_models import tinygpt_rows
from vary_rows import vary_rows
from whole import WholeFamily


def fused_rows(header: Any, targets: Any, planned: Any) -> dict[str, WholeFamily]:
    """Return the rows, made of what the others say of recipes, adapters and the planner too."""
    return {
        **minigemini_rows(header, targets, planned),
        **blip2_rows(targets, planned),
        **minigpt_rows(header, planned),
        **tinygpt_rows(header, planned),
        **cobra_rows(header, planned),
        **cogvlm_rows(header, planned),
        **vary_rows(header, planned),
        **chameleon_rows(targets, header, planned),
        **cogagent_row(header, planned),
    }
