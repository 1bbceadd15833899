"""Text set in columns: which line stands where."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import ImageFont

Font = ImageFont.FreeTypeFont

_NOT_FIRST = set(",.;:!?)]}%\uff0c\u3002\uff1b\uff1a\uff01\uff1f\u3001\uff09\u300b\u201d\u2019")
"""Signs that no line begins with."""


@dataclass(frozen=True)
class Line:
    """A line of text on the flat page."""

    text: str
    font: Font
    x: float
    """Left end, pixels."""
    y: float
    """Baseline, pixels."""

    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the ink, pixels."""
        left, top, right, bottom = self.font.getbbox(self.text, anchor="ls")
        return self.x + left, self.y + top, self.x + right, self.y + bottom


@dataclass(frozen=True)
class Style:
    """How a page is set."""

    columns: int
    margin: int
    gap: int
    spacing: float
    """Distance of baselines by font size."""
    centred: bool


@dataclass(frozen=True)
class Paragraph:
    """A paragraph as it was set."""

    lines: tuple[Line, ...]
    text: str
    """What of it is on the page."""


def set_page(
    paragraphs: list[str], heading: str | None, font: Font, heading_font: Font, size: tuple[int, int], style: Style
) -> list[Paragraph]:
    """Fill the columns from left to right; what does not fit is not on the page.

    Args:
        paragraphs: The text.
        heading: One line over all columns, cut where it is too long; None for none.
        font: Font of the text.
        heading_font: Font of the heading.
        size: Width and height of the page, pixels.
        style: How to set it.
    """
    width, height = size
    top = float(style.margin)
    found: list[Paragraph] = []
    if heading:
        line = wrap(heading, heading_font, width - 2 * style.margin)[0]
        top += heading_font.size
        found.append(_paragraph([_place(line, heading_font, style, style.margin, width - 2 * style.margin, top)]))
        top += 0.6 * heading_font.size
    column_width = (width - 2 * style.margin - style.gap * (style.columns - 1)) / style.columns
    step = style.spacing * font.size
    column, y = 0, top + font.size
    for text in paragraphs:
        lines: list[Line] = []
        for piece in wrap(text, font, column_width):
            if y > height - style.margin:
                column, y = column + 1, top + font.size
            if column == style.columns:
                break
            x = style.margin + column * (column_width + style.gap)
            lines.append(_place(piece, font, style, x, column_width, y))
            y += step
        if lines:
            found.append(_paragraph(lines))
        if column == style.columns:
            break
        y += 0.4 * step
    return found


def wrap(text: str, font: Font, width: float) -> list[str]:
    """Break a paragraph into lines of ``width`` pixels: between words, and between Chinese characters.

    A single word that is too wide is broken.
    """
    lines: list[str] = []
    line = ""
    for unit in _units(text):
        if font.getlength((line + unit).rstrip()) <= width:
            line += unit
            continue
        if line.strip() and unit.strip() and unit[0] not in _NOT_FIRST:
            lines.append(line.rstrip())
            line = ""
        for char in unit:  # a closing sign hangs over; a word too wide is broken
            if line and char not in _NOT_FIRST and font.getlength(line + char) > width:
                lines.append(line.rstrip())
                line = ""
            line += char
        line = line.lstrip()
    if line.strip():
        lines.append(line.rstrip())
    return lines


def _units(text: str) -> list[str]:
    """What may not be broken: a word with the space behind it, or a character from CJK on."""
    units: list[str] = []
    word = ""
    for char in text:
        if char >= "\u2e80":
            units += [word, char] if word else [char]
            word = ""
            continue
        word += char
        if char == " ":
            units.append(word)
            word = ""
    return [*units, word] if word else units


def join_lines(lines: list[str]) -> str:
    """Put a paragraph's lines together again: with a space, but none beside Chinese characters."""
    text = ""
    for line in lines:
        tight = not text or text[-1] >= "\u2e80" or line[0] >= "\u2e80"
        text += line if tight else f" {line}"
    return text


def choose_style(rng: random.Random, width: int, font_size: int) -> Style:
    """Draw a style in which a line has room for some words."""
    margin = rng.randint(max(4, width // 40), max(5, width // 11))
    gap = rng.randint(font_size, 2 * font_size)
    room = (width - 2 * margin) / font_size
    columns = rng.choice([1, 1, 2] if room < 26 else [1, 1, 2, 2, 3]) if room >= 18 else 1
    return Style(columns, margin, gap, rng.uniform(1.2, 1.7), columns == 1 and rng.random() < 0.15)


def _place(text: str, font: Font, style: Style, x: float, width: float, y: float) -> Line:
    indent = (width - font.getlength(text)) / 2 if style.centred else 0.0
    return Line(text, font, x + max(0.0, indent), y)


def _paragraph(lines: list[Line]) -> Paragraph:
    return Paragraph(tuple(lines), join_lines([line.text for line in lines]))
