"""Visual Genome's regions: boxes with a phrase each, for finding what is named and for naming what is shown.

Source: visualgenome.org, ``region_descriptions.json``: ``[{"id", "regions": [{"region_id", "image_id", "phrase", "x",
"y", "width", "height"}]}]`` (version 1.0 says ``image_id`` instead of ``id``), in pixels of the picture as it is
stored, whose size is in ``image_data.json`` or in the picture itself. Where EXIF turns the picture, its boxes turn too.

A sample has up to ``per_sample`` regions of a picture, as turns of one conversation; samples alternate between
*grounding* (``<ref>phrase</ref>`` asks for ``<box>(x1,y1),(x2,y2)</box>``) and *grounded captioning*
(``<ref>This</ref><box>..</box>`` asks for ``is phrase``), the two forms of Qwen-VL's pre-training (arXiv 2308.12966);
or in the words and the notation of another family, which ``--boxes`` names (:mod:`megavlm.data.box_words`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from megavlm.config.errors import UserError
from megavlm.data.box_words import QWEN_VL_BOXES, BoxNotation, find_notation
from megavlm.data.formats.base import Broken, BrokenError, Record, field, identity, plain
from megavlm.data.formats.source import Source
from megavlm.data.frames import Frame, frame_of
from megavlm.data.images import ImageError

DEFAULT_PER_SAMPLE = 8


def matches(source: Source) -> bool:
    """Whether entries have regions with phrases."""
    lists = (entry.get("regions") for entry in source.head)
    return any(isinstance(r, dict) and "phrase" in r for regions in lists if isinstance(regions, list) for r in regions)


def read(source: Source) -> Iterator[Record | Broken]:
    """Yield the samples, picture after picture.

    Raises:
        UserError: The file holds no list, or ``per_sample`` is below 1.
    """
    per_sample = DEFAULT_PER_SAMPLE if source.per_sample is None else source.per_sample
    if per_sample < 1:
        raise UserError(f"--per-sample must be at least 1, not {per_sample}")
    known = _image_info(source)
    notation = QWEN_VL_BOXES if source.boxes is None else find_notation(source.boxes, "--boxes")
    for number, entry in enumerate(source.rows()):
        try:
            yield from _picture(source, entry, known, per_sample, number, notation)
        except BrokenError as error:
            yield error.about(identity(entry, "id", "image_id"))


def to_box(
    x1: float, y1: float, x2: float, y2: float, width: float, height: float, turn: int = 1,
    notation: BoxNotation = QWEN_VL_BOXES,
) -> str:  # fmt: skip
    """Write a box of pixels as one of the upright picture: as Qwen-VL does, integers from 0 to 999, or as another.

    Args:
        x1: Left.
        y1: Top.
        x2: Right.
        y2: Bottom.
        width: Of the picture as the box was measured in it.
        height: As ``width``.
        turn: How that picture is to be turned to stand upright, 1 (not at all) to 8, as EXIF counts.
        notation: How it is written.

    Raises:
        BrokenError: It has no area, or none inside the picture.
    """
    try:
        x1, y1, x2, y2, width, height = map(float, (x1, y1, x2, y2, width, height))
    except OverflowError:
        raise BrokenError("bad box", "the box has a number that is too large") from None
    if not (width > 0 and height > 0 and max(x1, 0) < min(x2, width) and max(y1, 0) < min(y2, height)):
        raise BrokenError("bad box", f"box ({x1:g}, {y1:g}, {x2:g}, {y2:g}) has no area in {width:g} x {height:g}")
    frame = Frame(width, height, turn)
    x1, y1, x2, y2 = frame.box(x1, y1, x2, y2)
    width, height = frame.upright
    return notation.write_pixels((x1, y1, x2, y2), (width, height))


def _image_info(source: Source) -> dict[int | str, Record]:
    if source.image_info is None:
        return {}
    info = source.below(source.image_info)
    entries = (entry for entry in info.rows() if isinstance(entry, dict)) if info.is_list else ()
    known = {
        entry["image_id"]: {key: entry.get(key) for key in ("url", "width", "height")}
        for entry in entries
        if isinstance(entry.get("image_id"), int | str)
    }
    if not known:
        raise UserError(f"--image-info {source.image_info} has no images; give Visual Genome's image_data.json")
    return known


def _picture(
    source: Source, entry: Any, known: dict[int | str, Record], per_sample: int, number: int, notation: BoxNotation
) -> Iterator[Record | Broken]:
    regions = field(entry, "regions", list)
    image_id = identity(entry, "image_id", "id")
    if image_id is None:
        image_id = identity(regions[0], "image_id") if regions else None
    if image_id is None:
        raise BrokenError("bad record", "the picture has no id")
    image, frame = _locate(source, image_id, known.get(image_id, {}))
    usable: list[tuple[str, str]] = []
    for region in regions:
        try:
            x, y, w, h = (field(region, key, (int, float)) for key in ("x", "y", "width", "height"))
            usable.append(
                (
                    _unmarked(plain(field(region, "phrase"), "the phrase"), notation),
                    to_box(x, y, x + w, y + h, frame.width, frame.height, frame.turn, notation),
                )
            )
        except BrokenError as error:
            yield error.about(identity(region, "region_id"))
    for part, start in enumerate(range(0, len(usable), per_sample)):
        # By the picture's number too, so that pictures with few regions bring both kinds.
        find = (number + part) % 2 == 0
        yield _sample(f"{image_id}-{part}", image, usable[start : start + per_sample], find, notation)


def _unmarked(phrase: str, notation: BoxNotation) -> str:
    """Return a phrase.

    Raises:
        BrokenError: it holds what would mean a box or a task in this notation.
    """
    mark = re.search(notation.marks, phrase)
    if mark:
        said = f"the phrase contains {mark[0]}, which would be read as markup (--boxes {notation.name})"
        raise BrokenError("markup in text", said)
    return phrase


def _sample(sample_id: str, image: str, regions: list[tuple[str, str]], find: bool, notation: BoxNotation) -> Record:
    turns = []
    for index, (phrase, box) in enumerate(regions):
        question = notation.asks.format(thing=phrase) if find else notation.names.format(box=box)
        shown = (
            "" if index else f"<img>{image}</img>" if notation is QWEN_VL_BOXES else f"Picture 1: <img>{image}</img>\n"
        )
        turns.append({"from": "user", "value": shown + question})
        turns.append({"from": "assistant", "value": box if find else notation.named.format(thing=phrase)})
    return {"id": sample_id, "task": "grounding" if find else "grounded caption", "conversations": turns}


def _locate(source: Source, image_id: int | str, info: Record) -> tuple[str, Frame]:
    """Path below the image directory, and the frame that boxes were measured in."""
    candidates = [f"VG_100K/{image_id}.jpg", f"VG_100K_2/{image_id}.jpg", f"{image_id}.jpg"]
    if isinstance(info.get("url"), str):
        parts = urlsplit(info["url"]).path.split("/")
        candidates = ["/".join(parts[-2:]), parts[-1], *candidates]
    image = source.find_image(candidates)
    if not source.has_image(image):
        raise BrokenError("image missing", f"no picture {image_id} in {source.where}: neither {', '.join(candidates)}")
    sides = [info.get("width"), info.get("height")]
    try:
        known = [float(side) for side in sides if isinstance(side, int | float)]
        return image, frame_of(source.read_image(image), *(known if len(known) == 2 else ()))
    except OverflowError:
        raise BrokenError("bad box", f"the size of image {image!r} has a number that is too large") from None
    except ImageError as error:
        raise BrokenError(f"bad image ({error.cause})", f"image {image!r}: {error}") from None
