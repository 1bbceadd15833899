"""Example questions for the page, with pictures that this file draws: nobody else's, and the same everywhere."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_SIZE = (480, 360)
_FINE = 3
"""Pictures are drawn so many times as large, and made smaller: their edges are smooth."""
_Colour = tuple[int, int, int]
_SKY, _HILL, _NEAR_HILL = (222, 236, 243), (151, 190, 158), (104, 156, 120)
_RED, _BLUE, _YELLOW, _INK, _PAPER = (214, 66, 60), (52, 104, 176), (240, 184, 62), (40, 44, 54), (250, 248, 242)


@dataclass(frozen=True)
class Example:
    """A question with its pictures."""

    title: str
    question: str
    pictures: tuple[tuple[str, bytes], ...]
    """Name and PNG file of each."""
    thing: str | None = None
    """What is to be found, of a question whose words depend on the model."""
    sizes: tuple[tuple[int, int], ...] = (_SIZE,)

    def asking(self, question: str) -> Example:
        """Return it with other words."""
        return replace(self, question=question)

    @property
    def told(self) -> dict[str, Any]:
        """What the page is told."""
        return {"title": self.title, "question": self.question, "pictures": [name for name, _ in self.pictures]}


@functools.cache
def examples() -> tuple[Example, ...]:
    """Return all of them."""
    morning, evening = _png(lambda draw: _balloons(draw, 3)), _png(lambda draw: _balloons(draw, 2, moved=True))
    both = (("before.png", morning), ("after.png", evening))
    return (
        Example("Describe", "What do you see in this picture?", (("balloons.png", morning),)),
        Example("Find", "", (("balloons.png", morning),), thing="the red balloon"),
        Example("Read", "What does the sign say?", (("sign.png", _png(_sign)),)),
        Example("Chart", "Which day has the highest bar, and what is its value?", (("chart.png", _png(_chart)),)),
        Example("Compare", "What has changed from the first picture to the second?", both, sizes=(_SIZE, _SIZE)),
    )


class _Pen:
    """Draws in the units of the finished picture."""

    def __init__(self, image: Image.Image) -> None:
        self._draw = ImageDraw.Draw(image)

    def ellipse(self, x: float, y: float, across: float, down: float, fill: _Colour) -> None:
        """Around a middle."""
        self._draw.ellipse(_scaled(x - across, y - down, x + across, y + down), fill)

    def box(self, left: float, top: float, right: float, bottom: float, fill: _Colour, radius: float = 0) -> None:
        self._draw.rounded_rectangle(_scaled(left, top, right, bottom), radius * _FINE, fill)

    def polygon(self, *points: tuple[float, float], fill: _Colour) -> None:
        self._draw.polygon([(x * _FINE, y * _FINE) for x, y in points], fill)

    def line(self, *points: tuple[float, float], fill: _Colour, width: float) -> None:
        self._draw.line([(x * _FINE, y * _FINE) for x, y in points], fill, round(width * _FINE), joint="curve")

    def text(self, x: float, y: float, text: str, size: float, fill: _Colour) -> None:
        """Around a middle."""
        font = ImageFont.load_default(size * _FINE)
        self._draw.text((x * _FINE, y * _FINE), text, fill, font, anchor="mm")


def _scaled(*sides: float) -> tuple[float, ...]:
    return tuple(side * _FINE for side in sides)


def _png(paint: Callable[[_Pen], None], ground: _Colour = _SKY) -> bytes:
    image = Image.new("RGB", (_SIZE[0] * _FINE, _SIZE[1] * _FINE), ground)
    paint(_Pen(image))
    out = io.BytesIO()
    image.resize(_SIZE, Image.Resampling.LANCZOS).quantize(96).save(out, "PNG", optimize=True)
    return out.getvalue()


def _balloons(draw: _Pen, count: int, moved: bool = False) -> None:
    """Hills under a sky with balloons."""
    draw.ellipse(400, 70, 34, 34, (250, 214, 130))
    for x, y in ((90, 60), (300, 112)):
        for shift, size in ((-26, 15), (0, 22), (28, 17)):
            draw.ellipse(x + shift, y, size * 1.5, size * 0.62, (250, 252, 253))
    for colour, height, swing, start in ((_HILL, 268, 26, 0.4), (_NEAR_HILL, 304, 20, 2.6)):
        ridge = [(x, height - swing * math.sin(x / 88 + start)) for x in range(0, 484, 4)]
        draw.polygon((0, 360), *ridge, (480, 360), fill=colour)
    places = [(150, 140, 46, _RED), (330, 190, 34, _BLUE), (236, 84, 26, _YELLOW)][:count]
    if moved:
        places = [(190, 112, 46, _RED), (330, 190, 34, _BLUE)]
    for x, y, size, colour in places:
        _balloon(draw, x, y, size, colour)


def _balloon(draw: _Pen, x: float, y: float, size: float, colour: _Colour) -> None:
    pale: _Colour = tuple(round(255 - (255 - part) * 0.62) for part in colour)  # type: ignore[assignment]
    low = y + size * 1.62
    for side in (-0.34, 0.34):
        draw.line((x + side * size * 1.5, y + size * 0.8), (x + side * size * 0.62, low), fill=_INK, width=1.2)
    draw.ellipse(x, y, size, size * 1.08, colour)
    draw.polygon((x - size * 0.8, y + size * 0.62), (x + size * 0.8, y + size * 0.62),
                 (x + size * 0.24, y + size * 1.3), (x - size * 0.24, y + size * 1.3), fill=colour)  # fmt: skip
    draw.ellipse(x, y, size * 0.42, size * 1.08, pale)
    draw.box(x - size * 0.26, low, x + size * 0.26, low + size * 0.36, (146, 100, 62), 2)


def _sign(draw: _Pen) -> None:
    """A sign at a path."""
    draw.polygon((0, 250), (480, 226), (480, 360), (0, 360), fill=_HILL)
    draw.polygon((206, 360), (330, 360), (268, 236), (252, 237), fill=(226, 212, 182))
    draw.box(232, 150, 248, 330, (128, 92, 60), 3)
    draw.box(92, 62, 388, 188, (58, 98, 74), 12)
    draw.box(99, 69, 381, 181, (236, 240, 230), 8)
    draw.box(103, 73, 377, 177, (58, 98, 74), 6)
    draw.text(240, 106, "LAKE PATH", 34, _PAPER)
    draw.text(240, 148, "2.5 km - open 7 to 19", 19, _PAPER)


def _chart(draw: _Pen) -> None:
    """Bars."""
    draw.box(0, 0, 480, 360, _PAPER)
    draw.text(240, 62, "Visitors a day", 20, _INK)
    for row in range(5):
        draw.line((56, 282 - row * 46), (450, 282 - row * 46), fill=(222, 220, 212), width=1)
        draw.text(34, 282 - row * 46, str(row * 20), 13, (110, 112, 120))
    for place, (day, value) in enumerate({"Mon": 34, "Tue": 52, "Wed": 41, "Thu": 76, "Fri": 58}.items()):
        left = 76 + place * 76
        draw.box(left, 282 - value * 2.3, left + 46, 282, _BLUE if value < 76 else _RED, 3)
        draw.text(left + 23, 271 - value * 2.3, str(value), 15, _INK)
        draw.text(left + 23, 300, day, 16, _INK)
