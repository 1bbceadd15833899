"""Boxes in answers, in the notations that published models write, as parts of the picture's sides.

What is trained on and scored is Qwen-VL's notation alone (:mod:`megavlm.data.boxes`); this is for showing an answer.
The notations, and where they are published:

- ``<ref>name</ref><box>(x1,y1),(x2,y2)</box>``, thousandths: Qwen-VL (arXiv 2308.12966).
- ``<|object_ref_start|>name<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>``, thousandths: Qwen2-VL
  (2409.12191).
- ``<ref>name</ref><box>[[x1, y1, x2, y2], ..]</box>``, thousandths: InternVL (2312.14238); with spaces and no brackets,
  MiniCPM-V 2.6.
- JSON with ``bbox_2d`` and ``label``: Qwen2.5-VL (2502.13923), in pixels of the picture as its processor resizes it;
  Qwen3-VL and GLM-4.1V (2507.01006), in thousandths.
- ``<loc0000>`` four times, then the name; top, left, bottom, right in 1024ths: PaliGemma (2407.07726).
- ``[0.12, 0.3, 0.5, 0.75]``, parts of the sides: LLaVA-1.5 (2310.03744).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import NamedTuple

_MOST = 200
"""Boxes that are read of one answer."""
_NAME = (
    r"(?:<ref>(?P<ref>[^<]*)</ref>\s*|<\|object_ref_start\|>(?P<object>(?:(?!<\|)[^\n]){0,300})"
    r"<\|object_ref_end\|>\s*)?"
)
_TAGGED = re.compile(
    rf"{_NAME}(?:<box>(?P<box>[^<]{{0,4000}})</box>|<\|box_start\|>(?P<start>[^<]{{0,4000}})<\|box_end\|>)"
)
_GLM = re.compile(r"<\|begin_of_box\|>(?P<box>[\[\](){}\d,.\s]{7,4000})<\|end_of_box\|>")
_LOC = re.compile(r"(?P<locs>(?:<loc\d{4}>){4})[ ]?(?P<name>[^<;\n]*)")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_PARTS = re.compile(r"\[\s*(?:[01]?\.\d+|[01])(?:\s*,\s*(?:[01]?\.\d+|[01])){3}\s*\]")
_JSON_START = re.compile(r"[\[{]")


class FoundBox(NamedTuple):
    """A box that an answer names."""

    name: str | None
    sides: tuple[float, float, float, float]
    """Left, top, right and bottom, as parts (0 to 1) of the picture's width and height."""


def find_boxes(answer: str, *, pixels_of: tuple[int, int] | None = None) -> list[FoundBox]:
    """Return the boxes of an answer, in the order in which they stand; none that leaves the picture or has no area.

    Args:
        answer: what the model said.
        pixels_of: width and height of the picture as the model sees it, where ``bbox_2d`` counts its pixels; None
            where it counts thousandths.
    """
    found: list[tuple[int, FoundBox]] = []
    for at, name, numbers, (wide, tall) in _raw(answer, pixels_of or (1000, 1000)):
        for left, top, right, bottom in zip(*(iter(numbers),) * 4, strict=False):
            sides = (left / wide, top / tall, right / wide, bottom / tall)
            if 0 <= sides[0] < sides[2] <= 1 and 0 <= sides[1] < sides[3] <= 1:
                found.append((at, FoundBox(name.strip() or None if name else None, sides)))
    return [box for _, box in sorted(found, key=lambda one: one[0])][:_MOST]


_Raw = tuple[int, str | None, list[float], tuple[float, float]]
"""Where it stands, its name, numbers (four a box), and what counts as the whole width and height."""


def _raw(answer: str, json_size: tuple[int, int]) -> Iterator[_Raw]:
    tagged = list(_TAGGED.finditer(answer))
    for match in tagged:
        name = match["ref"] if match["ref"] is not None else match["object"]
        yield match.start(), name, _numbers(match["box"] or match["start"] or ""), (1000, 1000)
    for match in _LOC.finditer(answer):
        top, left, bottom, right = (float(place) for place in re.findall(r"\d{4}", match["locs"]))
        yield match.start(), match["name"], [left, top, right, bottom], (1024, 1024)
    named = list(_json_boxes(answer))
    for at, name, numbers in named:
        yield at, name, numbers, json_size
    if not tagged and not named:
        for match in _GLM.finditer(answer):
            yield match.start(), None, _numbers(match["box"]), (1000, 1000)
        for match in _PARTS.finditer(answer):
            yield match.start(), None, _numbers(match[0]), (1, 1)


def _numbers(text: str) -> list[float]:
    numbers = [float(number) for number in _NUMBER.findall(text)[: 4 * _MOST]]
    return numbers if len(numbers) % 4 == 0 else []


def _json_boxes(answer: str) -> Iterator[tuple[int, str | None, list[float]]]:
    """Yield what stands under ``bbox_2d``, also where the answer ended within its list."""
    decoder, at = json.JSONDecoder(), 0
    if "bbox_2d" not in answer:
        return
    while match := _JSON_START.search(answer, at):
        at = match.start()
        try:
            value, end = decoder.raw_decode(answer, at)
        except (ValueError, RecursionError):
            at += 1  # a list that was cut off: its objects are read one by one
            continue
        for one in value if isinstance(value, list) else [value]:
            box = one.get("bbox_2d") if isinstance(one, dict) else None
            if isinstance(box, list) and len(box) == 4 and all(type(side) in (int, float) for side in box):
                label = one.get("label")
                yield at, label if isinstance(label, str) else None, [float(side) for side in box]
        at = end
