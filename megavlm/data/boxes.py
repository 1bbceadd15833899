"""Boxes as Qwen-VL writes them in text."""

from __future__ import annotations

import re

Box = tuple[int, int, int, int]
"""``(x1, y1, x2, y2)`` in thousandths of the picture's sides."""

_NUMBER = r"\s*(\d{1,4})\s*"
_BOX = re.compile(
    r"(?:<ref>(?P<ref>[^<]*)</ref>\s*)?"
    rf"<box>\s*\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)\s*</box>"
)


def parse_boxes(text: str) -> list[tuple[str | None, Box]]:
    """All well-formed boxes in Qwen-VL's notation, each with its ``<ref>`` text if it has one.

    A box is skipped if it is malformed, has a coordinate above 1000, or has no area.
    """
    boxes: list[tuple[str | None, Box]] = []
    for match in _BOX.finditer(text):
        x1, y1, x2, y2 = (int(match[group]) for group in range(2, 6))
        if x1 < x2 <= 1000 and y1 < y2 <= 1000:
            name = match["ref"]
            boxes.append((name.strip() if name is not None else None, (x1, y1, x2, y2)))
    return boxes
