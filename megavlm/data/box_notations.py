"""Boxes in answers, in the notations that published models write, as parts of the picture's sides.

It is what answers are scored, drawn and shown by; :mod:`megavlm.data.box_space` knows what a model's numbers count, and
:mod:`megavlm.data.box_words` how boxes are written and asked for.

The notations, the papers, and what of the authors' own they were held against:

- ``<ref>name</ref><box>(x1,y1),(x2,y2)</box>``, thousandths: Qwen-VL (arXiv 2308.12966; its README).
- ``<|object_ref_start|>name<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>``, thousandths: Qwen2-VL
  (2409.12191; issue 189 of its repository for the thousandths).
- ``<ref>name</ref><box>[[x1, y1, x2, y2], ..]</box>``, thousandths: InternVL (2312.14238; issue 285 of its
  repository); with spaces and no brackets, MiniCPM-V and -o 2.6 (issues 772 and 982 of theirs).
- JSON with ``bbox_2d`` and ``label``: Qwen2.5-VL (2502.13923), in pixels of the picture as its processor resizes it
  (issues 782 and 940 of Qwen3-VL's repository); Qwen3-VL, in thousandths (issue 2020); GLM-4.1V (2507.01006).
- ``<|begin_of_box|>[[x1,y1,x2,y2]]<|end_of_box|>``, thousandths, within brackets of any kind: GLM-4.1V (its README).
- ``[[086,540,400,760]]``, thousandths in three digits, several with ``;`` between them: CogVLM's grounding models
  (2311.03079; README of THUDM/CogVLM, "Format of coordination"); with ``],[`` between them, too.
- ``<loc0000>`` four times, then the name; top, left, bottom, right in 1024ths: PaliGemma (2407.07726).
- ``[0.12, 0.3, 0.5, 0.75]``, parts of the sides: LLaVA-1.5 (2310.03744), of the square that the picture is padded to
  (issue 606 of LLaVA's repository).
- ``<p>name</p>{<10><20><50><75>}``, hundredths, ``<delim>`` between several: MiniGPT-v2 (2310.09478; ``demo_v2.py`` and
  ``minigpt4/datasets/datasets/coco_dataset.py`` of its repository). Spaces and ``<unk>`` within are passed over, as
  its ``eval_scripts/eval_ref.py`` does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

_MOST = 200
"""Boxes that are read of one answer."""
_MOST_TRIES = 1000
"""Places of an answer at which JSON is tried: each try may read far."""
_NAME = (
    r"(?:<ref>(?P<ref>[^<]*)</ref>\s*|<\|object_ref_start\|>(?P<object>(?:(?!<\|)[^\n]){0,300})"
    r"<\|object_ref_end\|>\s*)?"
)
_TAGGED = re.compile(
    rf"{_NAME}(?:<box>(?P<box>[^<]{{0,4000}})</box>|<\|box_start\|>(?P<start>[^<]{{0,4000}})<\|box_end\|>)"
)
_GLM = re.compile(r"<\|begin_of_box\|>(?P<box>[\[\](){}<>\d,.\s-]{7,4000})<\|end_of_box\|>")
_COG_BOX = r"\d{3}(?:,\d{3}){3}"
_COG = re.compile(rf"\[\[{_COG_BOX}(?:(?:;|\]\s*,\s*\[){_COG_BOX}){{0,199}}\]\]")
_LOC = re.compile(r"(?P<locs>(?:<loc\d{4}>){4})[ ]?(?P<name>[^<;\n]*)")
_NOTHING = r"(?:\s|<unk>)*+"
_HUNDREDTHS_BOX = rf"\{{(?:{_NOTHING}<{_NOTHING}\d{{1,3}}{_NOTHING}>){{4}}{_NOTHING}\}}"
_HUNDREDTHS = re.compile(
    rf"(?:<p>(?P<name>[^<]{{0,300}})</p>\s*)?(?P<boxes>{_HUNDREDTHS_BOX}(?:\s*<delim>\s*{_HUNDREDTHS_BOX})*)"
)
_NUMBER = re.compile(r"-?(?:\d+(?:\.\d+)?|(?<![\d.])\.\d+)")
_PART = r"-?(?:[01]?\.\d+|[01])"
_PARTS = re.compile(rf"\[\s*{_PART}(?:\s*,\s*{_PART}){{3}}\s*\]")
_JSON_START = re.compile(r"[\[{]")


Place = tuple[float, float, float, float]
"""Parts of two sides: left, top, and right and bottom (of a box), or width and height (of where a picture lies)."""


class FoundBox(NamedTuple):
    """A box that an answer names."""

    name: str | None
    sides: Place
    """Left, top, right and bottom, as parts (0 to 1) of the picture's width and height."""


def find_boxes(
    answer: str, *, pixels_of: tuple[int, int] | None = None, parts_of: Place | None = None
) -> list[FoundBox]:
    """Return the boxes of an answer, in the order in which they stand; none that has no area in the picture.

    What of a box is beyond the picture's edges is cut off: models miss an edge by a pixel.

    Args:
        answer: what the model said.
        pixels_of: width and height of the picture as the model sees it, where ``bbox_2d`` counts its pixels; None
            where it counts thousandths.
        parts_of: where the picture lies on the plane whose parts bare numbers count; None where that is the picture.
    """
    found: list[tuple[int, FoundBox]] = []
    for at, name, numbers, (wide, tall) in _raw(answer, pixels_of or (1000, 1000)):
        for left, top, right, bottom in zip(*(iter(numbers),) * 4, strict=False):
            sides: Place = (left / wide, top / tall, right / wide, bottom / tall)
            if parts_of is not None and (wide, tall) == (1, 1):
                sides = _from_plane(sides, parts_of)
            inside = _cut(sides)
            if inside is not None:
                found.append((at, FoundBox(name.strip() or None if name else None, inside)))
    return [box for _, box in sorted(found, key=lambda one: one[0])][:_MOST]


def _cut(sides: Place) -> Place | None:
    """Return what of a box is in the picture; None where that has no area, or the box is the wrong way round."""
    x1, y1, x2, y2 = (min(1.0, max(0.0, part)) for part in sides)
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _from_plane(sides: Place, place: Place) -> Place:
    """Return a box of a plane as one of the picture that lies at ``place`` of it."""
    left, top, width, height = place
    return (sides[0] - left) / width, (sides[1] - top) / height, (sides[2] - left) / width, (sides[3] - top) / height


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
    for match in _HUNDREDTHS.finditer(answer):
        yield match.start(), match["name"], _numbers(match["boxes"]), (100, 100)
    named = list(_json_boxes(answer))
    for at, name, numbers in named:
        yield at, name, numbers, json_size
    if not tagged and not named:
        marked = list(_GLM.finditer(answer))
        for match in marked:
            yield match.start(), None, _numbers(match["box"]), (1000, 1000)
        for match in _COG.finditer(answer) if not marked else ():
            yield match.start(), None, _numbers(match[0]), (1000, 1000)
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
    for _ in range(_MOST_TRIES):
        match = _JSON_START.search(answer, at)
        if match is None:
            return
        at = match.start()
        try:
            value, end = decoder.raw_decode(answer, at)
        except (ValueError, RecursionError):
            at += 1  # a list that was cut off: its objects are read one by one
            continue
        yield from ((at, *one) for one in _labelled(value, None))
        at = end


def _labelled(value: Any, label: str | None) -> Iterator[tuple[str | None, list[float]]]:
    """Yield the boxes of a JSON value, also of one that holds others, as deep as JSON was read."""
    waiting = [(value, label)]
    while waiting:
        one, label = waiting.pop()
        if isinstance(one, dict):
            own = one.get("label")
            label = own if isinstance(own, str) else label
            boxes: Any = one.get("bbox_2d")
            for box in [boxes] if _is_box(boxes) else boxes if isinstance(boxes, list) else []:
                if _is_box(box):
                    yield label, [float(side) for side in box]
            waiting += [(inner, label) for inner in reversed(one.values()) if isinstance(inner, dict | list)]
        elif isinstance(one, list):
            waiting += [(inner, label) for inner in reversed(one) if isinstance(inner, dict | list)]


def _is_box(value: Any) -> bool:
    """Whether these are four numbers, none of which is too large for a float."""
    return isinstance(value, list) and len(value) == 4 and all(
        type(side) in (int, float) and abs(side) < 1e9 for side in value
    )  # fmt: skip
