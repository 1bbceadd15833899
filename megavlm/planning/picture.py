"""A picture of a pipeline schedule: a row per rank, a block per pass; PNG or SVG."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megavlm.config.errors import RecipeError
from megavlm.planning.schedule import Timeline

_WIDTH, _LEFT, _TOP, _ROW, _GAP, _BOTTOM = 1600, 90, 64, 44, 8, 48
_FORWARD = ("#4c78a8", "#7fa7d1", "#a9c6e3", "#cfdff0")
_BACKWARD = ("#f2a541", "#f6bf78", "#f9d5a5", "#fce8cd")
_INK, _GRID, _PAPER = "#222222", "#c8c8c8", "#ffffff"
_SMALLEST_LABEL = 15
"""Pixels that a block needs to carry its number."""


@dataclass(frozen=True)
class _PictureBox:
    x: float
    y: float
    width: float
    height: float
    fill: str


@dataclass(frozen=True)
class _Text:
    x: float
    y: float
    words: str
    size: int
    centred: bool = False


def draw(timeline: Timeline, title: str, path: Path) -> None:
    """Write a picture of ``timeline``.

    Args:
        timeline: a simulated step.
        title: line above the picture.
        path: file to write; .png or .svg.

    Raises:
        RecipeError: another kind of file.
    """
    check_picture(path)
    boxes, texts, size = _shapes(timeline, title)
    if path.suffix == ".svg":
        path.write_text(_svg(boxes, texts, size), encoding="utf-8")
    else:
        _png(boxes, texts, size, path)


def check_picture(path: Path) -> None:
    """Check that a picture can be written under this name.

    Raises:
        RecipeError: it is neither .png nor .svg.
    """
    if path.suffix not in (".png", ".svg"):
        raise RecipeError(f"--picture: {path}: is neither .png nor .svg; give the file one of these endings")


def _shapes(timeline: Timeline, title: str) -> tuple[list[_PictureBox], list[_Text], tuple[int, int]]:
    height = _TOP + timeline.pipeline * (_ROW + _GAP) + _BOTTOM
    scale = (_WIDTH - _LEFT - 20) / timeline.total
    boxes: list[_PictureBox] = []
    texts = [_Text(_LEFT, 12, title, 18)]
    bottom = height - _BOTTOM
    for tick in range(11):
        x = _LEFT + tick / 10 * timeline.total * scale
        boxes.append(_PictureBox(x, _TOP - 4, 1, bottom - _TOP + 4, _GRID))
        texts.append(_Text(x, bottom + 6, f"{1e3 * tick / 10 * timeline.total:.0f}", 13, centred=True))
    texts.append(_Text(_LEFT, bottom + 24, _legend(timeline), 13))
    for rank in range(timeline.pipeline):
        texts.append(_Text(10, _TOP + rank * (_ROW + _GAP) + _ROW / 2 - 8, f"stage {rank}", 15))
    for op in timeline.ops:
        colours = _FORWARD if op.kind in "FE" else _BACKWARD
        y, width = _TOP + op.rank * (_ROW + _GAP), (op.end - op.start) * scale
        x = _LEFT + op.start * scale
        boxes.append(_PictureBox(x, y, max(width - 1, 0.5), _ROW, colours[op.chunk % len(colours)]))
        if width >= _SMALLEST_LABEL:
            texts.append(_Text(x + width / 2, y + _ROW / 2 - 7, str(op.microbatch), 12, centred=True))
    return boxes, texts, (_WIDTH, height)


def _legend(timeline: Timeline) -> str:
    chunks = f"; paler: chunk 1 to {timeline.virtual - 1} of a stage" if timeline.virtual > 1 else ""
    return f"milliseconds; blue: forward, orange: backward, by number of the micro-batch; white: waiting{chunks}"


def _svg(boxes: list[_PictureBox], texts: list[_Text], size: tuple[int, int]) -> str:
    width, height = size
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        f'<rect width="{width}" height="{height}" fill="{_PAPER}"/>',
    ]
    lines += [
        f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" fill="{box.fill}"/>'
        for box in boxes
    ]
    for text in texts:
        anchor = ' text-anchor="middle"' if text.centred else ""
        words = text.words.replace("&", "&amp;").replace("<", "&lt;")
        lines.append(
            f'<text x="{text.x:.1f}" y="{text.y + text.size:.1f}" font-family="sans-serif" font-size="{text.size}"'
            f' fill="{_INK}"{anchor}>{words}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


def _png(boxes: list[_PictureBox], texts: list[_Text], size: tuple[int, int], path: Path) -> None:
    from PIL import Image, ImageDraw, ImageFont  # noqa: PLC0415 - only where a picture is wanted

    image = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(image)
    for box in boxes:
        pen.rectangle((box.x, box.y, box.x + box.width - 1, box.y + box.height - 1), fill=box.fill)
    for text in texts:
        font = ImageFont.load_default(text.size)
        pen.text((text.x, text.y), text.words, fill=_INK, font=font, anchor="ma" if text.centred else "la")
    image.save(path)
