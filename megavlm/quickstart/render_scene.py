"""Scenes of the quickstart's synthetic pictures, and how they are drawn.

A picture is divided into an 8 x 8 grid. Every object fills a square of whole grid cells, and the
outermost ring of cells stays empty, so every box coordinate is one of the seven numbers 125, 250,
... 875 (thousandths of the side) and is exact: the box touches the object's outline on all sides.
A picture with one object has it 3 or 4 cells wide anywhere inside the ring; with two or three
objects each is 3 cells wide and has a quadrant of its own.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

GRID = 8
"""Grid cells along a side."""
STEP = 1000 // GRID
"""Box coordinates are multiples of this many thousandths of the side."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 24, 36),
    "green": (20, 150, 50),
    "blue": (30, 70, 225),
    "yellow": (250, 222, 10),
    "purple": (150, 30, 190),
    "orange": (255, 128, 0),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")
WORDS: tuple[str, ...] = (
    "CAT", "DOG", "SUN", "HAT", "BUS", "CUP", "MAP", "KEY", "TEN", "BOX", "GO", "STOP",
)  # fmt: skip
TEXT_COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (20, 20, 20),
    "red": COLOURS["red"],
    "green": COLOURS["green"],
    "blue": COLOURS["blue"],
    "purple": COLOURS["purple"],
}

_QUADRANTS = ((1, 1), (4, 1), (1, 4), (4, 4))
_COLOUR_NAMES = tuple(COLOURS)
_SUPERSAMPLE = 4
_TEXT_STEPS_X = 3
_TEXT_STEPS_Y = 5


@dataclass(frozen=True)
class SceneObject:
    """One object: what it is and which grid cells it fills."""

    shape: str
    colour: str
    column: int
    row: int
    cells: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """``(x1, y1, x2, y2)`` in thousandths of the picture's side."""
        right, bottom = self.column + self.cells, self.row + self.cells
        return self.column * STEP, self.row * STEP, right * STEP, bottom * STEP

    @property
    def name(self) -> str:
        """Such as ``red circle``."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Lettering:
    """A word written large; ``x`` and ``y`` number its place among the few allowed ones."""

    word: str
    colour: str
    x: int
    y: int


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one to three objects in reading order, or a word."""

    items: tuple[SceneObject, ...] = ()
    lettering: Lettering | None = None

    @property
    def key(self) -> str:
        """The layout as a string; two pictures with one key differ in background noise only."""
        if self.lettering is not None:
            mark = self.lettering
            return f"word {mark.word} {mark.colour} {mark.x} {mark.y}"
        return "; ".join(f"{i.name} {i.column} {i.row} {i.cells}" for i in self.items)

    def find(self, shape: str) -> SceneObject | None:
        """The object of that shape, if there is one (shapes never repeat in a scene)."""
        return next((item for item in self.items if item.shape == shape), None)


def is_heldout_layout(scene: Scene) -> bool:
    """Whether a layout belongs to the held-out split, as one in six does.

    There are only some hundred layouts with one object, so drawing both splits at random would
    put every held-out layout into the training data as well. Of these the places are dealt out
    per object, so that every kind of object has some held-out places.
    """
    if len(scene.items) == 1:
        (item,) = scene.items
        return (_hash(f"{item.name} {item.cells}") + item.column + 3 * item.row) % 6 == 0
    return _hash(scene.key) % 6 == 0


def draw_items(rng: random.Random, count: int, *, shape: str | None = None, colour: str | None = None) -> Scene:
    """A random scene of ``count`` objects; some object has ``shape``, the same one ``colour``."""
    shapes = _sample_with(rng, SHAPES, count, shape)
    colours = _sample_with(rng, _COLOUR_NAMES, count, colour)
    if count == 1:
        cells = rng.choice((3, 4))
        last = GRID - 1 - cells
        places = [(rng.randint(1, last), rng.randint(1, last))]
    else:
        cells = 3
        places = rng.sample(_QUADRANTS, count)
    items = [SceneObject(s, c, column, row, cells) for s, c, (column, row) in zip(shapes, colours, places, strict=True)]
    return Scene(tuple(sorted(items, key=lambda item: (item.row, item.column))))


def draw_lettering(rng: random.Random, word: str | None = None) -> Scene:
    """A random scene with a word (``word``, or any)."""
    mark = Lettering(
        word=rng.choice(WORDS) if word is None else word,
        colour=rng.choice(tuple(TEXT_COLOURS)),
        x=rng.randrange(_TEXT_STEPS_X),
        y=rng.randrange(_TEXT_STEPS_Y),
    )
    return Scene(lettering=mark)


def paint(scene: Scene, image_size: int, rng: random.Random) -> Image.Image:
    """The scene as an RGB picture of ``image_size`` pixels; ``rng`` makes the background."""
    image = _background(image_size, rng)
    cell = image_size // GRID
    for item in scene.items:
        mask = _shape_mask(item.shape, item.cells * cell)
        image.paste(COLOURS[item.colour], (item.column * cell, item.row * cell), mask)
    if scene.lettering is not None:
        mark = scene.lettering
        mask = _word_mask(mark.word, image_size)
        left = (image_size - mask.width) * mark.x // (_TEXT_STEPS_X - 1)
        top = (image_size - mask.height) * mark.y // (_TEXT_STEPS_Y - 1)
        image.paste(TEXT_COLOURS[mark.colour], (left, top), mask)
    return image


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def _sample_with(rng: random.Random, pool: Sequence[str], count: int, wanted: str | None) -> list[str]:
    """``count`` distinct members; ``wanted``, if given, is the first."""
    if wanted is None:
        return rng.sample(pool, count)
    return [wanted, *rng.sample([name for name in pool if name != wanted], count - 1)]


def _background(size: int, rng: random.Random) -> Image.Image:
    """A light, slightly tinted plain colour with a little noise of the same sign in all bands."""
    noise = rng.randbytes(size * size)
    bands = []
    for _ in range(3):
        base = rng.randint(226, 244)
        table = bytes(base + value % 13 - 6 for value in range(256))
        bands.append(Image.frombytes("L", (size, size), noise.translate(table)))
    return Image.merge("RGB", bands)


@lru_cache(maxsize=64)
def _shape_mask(shape: str, size: int) -> Image.Image:
    """An anti-aliased mask of ``size`` pixels which the shape touches on all four sides."""
    full = size * _SUPERSAMPLE
    mask = Image.new("L", (full, full), 0)
    draw = ImageDraw.Draw(mask)
    last = full - 1
    if shape == "circle":
        draw.ellipse((0, 0, last, last), fill=255)
    elif shape == "square":
        draw.rectangle((0, 0, last, last), fill=255)
    elif shape == "triangle":
        draw.polygon([(full // 2, 0), (last, last), (0, last)], fill=255)
    elif shape == "cross":
        near, far = full // 3, full - full // 3 - 1
        draw.rectangle((near, 0, far, last), fill=255)
        draw.rectangle((0, near, last, far), fill=255)
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    return mask.resize((size, size), Image.Resampling.BOX)


@lru_cache(maxsize=64)
def _word_mask(word: str, image_size: int) -> Image.Image:
    """The word, cropped to its ink plus a border, as large as fits the picture comfortably."""
    font_size = image_size * 27 // 64
    widest = image_size * 54 // 64
    stroke = image_size / 128
    while True:
        font = ImageFont.load_default(font_size)
        left, top, right, bottom = (round(value) for value in font.getbbox(word, stroke_width=stroke))
        if right - left <= widest or font_size <= 6:
            break
        font_size -= 1
    border = max(1, image_size // 21)
    mask = Image.new("L", (right - left + 2 * border, bottom - top + 2 * border), 0)
    draw = ImageDraw.Draw(mask)
    draw.text((border - left, border - top), word, fill=255, font=font, stroke_width=stroke)
    return mask
