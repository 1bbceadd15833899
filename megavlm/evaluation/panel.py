"""A picture of held-out questions with expected and predicted answers, for people to look at."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from megavlm.data.box_notations import Place, find_boxes
from megavlm.data.box_space import ReadBoxes
from megavlm.data.images import decode_with_pil
from megavlm.evaluation.metrics import box_hit, exact_match

_INK = (35, 38, 47)
_MUTED = (112, 118, 130)
_RIGHT = (18, 128, 62)
_WRONG = (196, 36, 44)
_PAGE = (238, 240, 244)
_CARD = (255, 255, 255)
_EMPTY = (246, 247, 250)
_MARGIN = 12
_PAD = 10
_FONT_SIZE = 14
_LINE = 19
_DASH = 5
_PICTURE_TAGS = re.compile(r"(?:Picture \d+:\s*)?<img>[^<]*</img>\n?")
_OTHER_TAGS = re.compile(r"<[^<>]{1,12}>")


@dataclass(frozen=True)
class PanelItem:
    """A question with no, one or several pictures (loaded, or paths) and its two answers.

    Boxes in the answers are drawn into the first picture. ``correct`` decides the colour; if it is
    left out, it is IoU >= 0.5 where a box is expected and exact match elsewhere.
    """

    question: str
    expected: str
    predicted: str
    images: Sequence[Image.Image | Path | str] = ()
    correct: bool | None = None
    boxes: ReadBoxes = find_boxes
    """Finds boxes in both answers, as parts of the first picture."""

    @property
    def is_correct(self) -> bool:
        """Whether the predicted answer counts as right."""
        if self.correct is not None:
            return self.correct
        if self.boxes(self.expected):
            return box_hit(self.predicted, self.expected, read=self.boxes)
        return exact_match(self.predicted, self.expected)


def draw_panel(
    items: Sequence[PanelItem],
    path: Path | None = None,
    *,
    columns: int = 4,
    card_width: int = 250,
    max_lines: int = 4,
) -> Image.Image:
    """A grid of cards, ``columns`` wide; written to ``path`` (PNG or as its name ends) if given.

    Predicted boxes are drawn solid, expected ones thin and dashed. A text longer than ``max_lines``
    lines is cut.
    """
    if not items:
        raise ValueError("a panel needs at least one item")
    font = ImageFont.load_default(_FONT_SIZE)
    columns = min(columns, len(items))
    inner = card_width - 2 * _PAD
    texts = [_lines(item, font, inner, max_lines) for item in items]
    rows = [range(first, min(first + columns, len(items))) for first in range(0, len(items), columns)]
    heights = [inner + 3 * _PAD + _LINE * max(len(texts[n]) for n in row) for row in rows]
    width = columns * (card_width + _MARGIN) + _MARGIN
    panel = Image.new("RGB", (width, sum(heights) + _MARGIN * (len(rows) + 1)), _PAGE)
    draw = ImageDraw.Draw(panel)
    top = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, number in enumerate(row):
            item, left = items[number], _MARGIN + column * (card_width + _MARGIN)
            accent = _RIGHT if item.is_correct else _WRONG
            corner = (left + card_width - 1, top + height - 1)
            draw.rounded_rectangle((left, top, *corner), radius=6, fill=_CARD)
            draw.rounded_rectangle((left, top, left + card_width - 1, top + 3), 2, fill=accent)
            panel.paste(_pictures(item, inner, font), (left + _PAD, top + _PAD))
            for n, (line, colour) in enumerate(texts[number]):
                at = (left + _PAD, top + inner + 2 * _PAD + n * _LINE)
                draw.text(at, line, fill=colour, font=font)
        top += height + _MARGIN
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        panel.save(path)
    return panel


def draw_pictures(item: PanelItem, side: int) -> Image.Image:
    """The item's pictures in a square of ``side`` pixels, with the boxes of both answers drawn into the first."""
    return _pictures(item, side, ImageFont.load_default(_FONT_SIZE))


_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_Colour = tuple[int, int, int]


def _lines(item: PanelItem, font: _Font, width: int, most: int) -> list[tuple[str, _Colour]]:
    """The card's text: the question, then the expected and the predicted answer."""
    accent = _RIGHT if item.is_correct else _WRONG
    parts = (
        (_plain(item.question), _INK),
        (f"expected: {_plain(item.expected)}", _MUTED),
        (f"predicted: {_plain(item.predicted) or '(nothing)'}", accent),
    )
    return [(line, colour) for text, colour in parts for line in _wrap(text, font, width, most)]


def _plain(text: str) -> str:
    """The text without picture references and tags, on one line."""
    return " ".join(_OTHER_TAGS.sub(" ", _PICTURE_TAGS.sub("", text)).split())


def _wrap(text: str, font: _Font, width: int, most: int) -> list[str]:
    """Break into lines of ``width`` pixels, within a word if need be; at most ``most`` lines."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1][:-3] + "..."]
    return lines


def _pictures(item: PanelItem, side: int, font: _Font) -> Image.Image:
    """The item's pictures side by side in a square of ``side`` pixels, with the boxes drawn in."""
    square = Image.new("RGB", (side, side), _EMPTY)
    if not item.images:
        ImageDraw.Draw(square).text((side // 2, side // 2), "no picture", _MUTED, font, anchor="mm")
        return square
    across = 1
    while across * across < len(item.images):
        across += 1
    down = -(-len(item.images) // across)
    pitch = side // across
    gap = 4 if across > 1 else 0
    upper = (side - down * pitch) // 2
    for number, source in enumerate(item.images):
        picture = _enlarge(source, pitch - gap)
        if number == 0:
            _draw_boxes(picture, item)
        left = number % across * pitch + (pitch - picture.width) // 2
        top = upper + number // across * pitch + (pitch - picture.height) // 2
        square.paste(picture, (left, top))
    return square


def _enlarge(source: Image.Image | Path | str, side: int) -> Image.Image:
    """A copy scaled so that its longer side is ``side`` pixels."""
    if isinstance(source, Image.Image):
        image = source.convert("RGB")
    else:
        image = decode_with_pil(Path(source).read_bytes())
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    method = Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS
    return image.resize(size, method)


def _draw_boxes(picture: Image.Image, item: PanelItem) -> None:
    """Predicted boxes in colour on a white rim, so that they show on any ground; then expected."""
    draw = ImageDraw.Draw(picture)
    accent = _RIGHT if item.is_correct else _WRONG
    for _, box in item.boxes(item.predicted):
        x1, y1, x2, y2 = _to_pixels(box, picture)
        draw.rectangle((x1 - 3, y1 - 3, x2 + 3, y2 + 3), outline=_CARD, width=5)
        draw.rectangle((x1 - 2, y1 - 2, x2 + 2, y2 + 2), outline=accent, width=3)
    for _, box in item.boxes(item.expected):
        x1, y1, x2, y2 = _to_pixels(box, picture)
        for y in (y1, y2):
            _dashes(draw, (x1, y), (x2, y))
        for x in (x1, x2):
            _dashes(draw, (x, y1), (x, y2))


def _to_pixels(box: Place, picture: Image.Image) -> tuple[int, int, int, int]:
    x1, y1, x2, y2 = box
    right, bottom = picture.width - 1, picture.height - 1
    return (
        round(x1 * right),
        round(y1 * bottom),
        round(x2 * right),
        round(y2 * bottom),
    )


def _dashes(draw: ImageDraw.ImageDraw, start: tuple[int, int], end: tuple[int, int]) -> None:
    """A thin line, horizontal or vertical, of dark and white dashes."""
    (x, y), (last_x, last_y) = start, end
    colours = (_INK, _CARD)
    number = 0
    while x < last_x or y < last_y:
        to_x, to_y = min(x + _DASH, last_x), min(y + _DASH, last_y)
        draw.line((x, y, to_x, to_y), fill=colours[number % 2])
        x, y, number = to_x, to_y, number + 1
