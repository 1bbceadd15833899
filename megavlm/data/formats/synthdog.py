"""SynthDoG's text pages: ``metadata.jsonl`` beside the pictures, a line ``{"file_name", "ground_truth"}`` for each.

Source: ``synthdog/template.py`` of github.com/clovaai/donut: ``ground_truth`` is JSON in a string,
``{"gt_parse": {"text_sequence": ".."}}``. ``megavlm render-text`` writes the same, and for some pages adds ``lines``,
``[{"text", "quad": [[x, y] x 4]}]`` in pixels, clockwise from the upper left corner of the text, and ``size``, the
picture's width and height. On the Hugging Face hub the same pages are rows of parquet, ``{"image", "ground_truth"}``.

Pages with lines are asked for ``OCR with grounding:``, and each line is answered as ``<ref>text</ref>`` with its
``<quad>``, as in Qwen-VL's pre-training (arXiv 2308.12966); the others for ``OCR:``, answered by the text alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from megavlm.data.formats.base import Broken, BrokenError, Record, field, identity, pair, plain
from megavlm.data.formats.source import Source
from megavlm.data.frames import Frame, frame_of
from megavlm.data.images import ImageError


def matches(source: Source) -> bool:
    """Whether entries have a file name and a ground truth."""
    return any(
        "ground_truth" in entry and "prompt" not in entry and ("file_name" in entry or "image" in entry)
        for entry in source.head
    )


def read(source: Source) -> Iterator[Record | Broken]:
    """Yield a record for each page.

    Raises:
        UserError: The file holds no list of them.
    """
    folder = source.path.absolute().parent
    root = source.images.absolute()
    below = f"{folder.relative_to(root).as_posix()}/" if folder.is_relative_to(root) and folder != root else ""
    for entry in source.rows():
        try:
            yield _page(source, entry, below)
        except BrokenError as error:
            yield error.about(identity(entry, "file_name", "image"))


def _page(source: Source, entry: Any, below: str) -> Record:
    name = field(entry, "image" if isinstance(entry, dict) and "image" in entry else "file_name")
    truth = field(entry, "ground_truth", (str, dict))
    if isinstance(truth, str):
        try:
            truth = json.loads(truth)
        except (ValueError, RecursionError) as error:
            raise BrokenError("bad JSON", f"'ground_truth' is not valid JSON: {error}") from None
    image = source.find_image([f"{below}{name}", name])
    if isinstance(truth, dict) and "lines" in truth:
        return pair(name, "ocr with grounding", image, "OCR with grounding:", _grounded(source, image, truth))
    text = plain(field(field(truth, "gt_parse", dict), "text_sequence"), "the page's text")
    return pair(name, "ocr", image, "OCR:", text)


def _grounded(source: Source, image: str, truth: Record) -> str:
    size = field(truth, "size", list)
    if len(size) != 2 or not all(isinstance(side, int | float) and 0 < side < 1e9 for side in size):
        raise BrokenError("bad record", "'size' must be the picture's width and height")
    try:
        frame = frame_of(source.read_image(image), *size)
    except (BrokenError, ImageError):
        frame = Frame(*size)  # the picture is missing or broken, which is told when it is wanted
    lines = [_line(line, frame) for line in field(truth, "lines", list)]
    if not lines:
        raise BrokenError("empty text", "the page has no lines")
    return "".join(lines)


def _line(line: Any, frame: Frame) -> str:
    text = plain(field(line, "text"), "a line's text")
    quad = field(line, "quad", list)
    try:
        points = [frame.point(float(x), float(y)) for x, y in quad]
    except (TypeError, ValueError, OverflowError):
        points = []
    if len(points) != 4 or not all(math.isfinite(x) and math.isfinite(y) for x, y in points):
        raise BrokenError("bad box", "'quad' must be four points x, y")
    width, height = frame.upright
    corners = ",".join(f"({_scaled(x, width)},{_scaled(y, height)})" for x, y in points)
    return f"<ref>{text}</ref><quad>{corners}</quad>"


def _scaled(value: float, side: float) -> int:
    """Thousandths of the side, from 0 to 999."""
    return math.floor(min(999.0, max(0.0, value * 1000 / side)))
