"""Boxes in answers against boxes in pixels: right where IoU >= 0.5."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megavlm.data.box_notations import find_boxes
from megavlm.data.box_space import ReadBoxes
from megavlm.evaluation.metrics.heldout import box_iou

_NUMBER = r"\s*(\d+(?:\.\d+)?)\s*"
_BOX = re.compile(rf"\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)")

LAST = 999
"""Qwen-VL's coordinates are 0 to 999; 999 is the right or lower edge (its eval_mm/evaluate_grounding.py)."""


def first_box(
    prediction: str, size: tuple[int, int], read: ReadBoxes = find_boxes
) -> tuple[float, float, float, float] | None:
    """Return the first box of a text in pixels of a picture of ``size`` (width, height); None without one.

    Two points are a box of Qwen-VL's as its evaluation reads it: a prompt may have opened its tag. Where there are
    none, ``read`` finds other notations.
    """
    match = _BOX.search(prediction)
    if match is not None:
        x1, y1, x2, y2 = (float(value) / LAST for value in match.groups())
    else:
        found = read(prediction)
        if not found:
            return None
        x1, y1, x2, y2 = found[0].sides
    return x1 * size[0], y1 * size[1], x2 * size[0], y2 * size[1]


def box_text(box: Sequence[float], size: tuple[int, int]) -> str:
    """Return a box in pixels in Qwen-VL's notation."""
    x1, y1, x2, y2 = (
        min(LAST, max(0, round(value / side * LAST))) for value, side in zip(box, (*size, *size), strict=True)
    )
    return f"<box>({x1},{y1}),({x2},{y2})</box>"


def hit(
    prediction: str, box: Sequence[float], size: tuple[int, int], threshold: float = 0.5, read: ReadBoxes = find_boxes
) -> float:
    """1 where the first box of the prediction overlaps ``box`` (pixels) by IoU >= ``threshold``."""
    found = first_box(prediction, size, read)
    return float(found is not None and box_iou(found, box) >= threshold)
