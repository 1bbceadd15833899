"""A page drawn: paper, ink, and what a camera or a scanner does to it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from megavlm.data.textpages.layout import Line

Colour = tuple[int, int, int]
Matrix = NDArray[np.float64]
"""[3, 3] projective map of points (x, y, 1)."""

_LEAST_CONTRAST = 4.5
"""Of ink to paper, as WCAG counts it: what can be read."""


def choose_colours(rng: random.Random) -> tuple[Colour, Colour]:
    """Draw paper and ink that can be told apart."""
    while True:
        tint = rng.randint(0, 40)
        light = tuple(rng.randint(215 - tint, 255) for _ in range(3))
        dark = tuple(rng.randint(0, 90) for _ in range(3))
        paper, ink = (dark, light) if rng.random() < 0.12 else (light, dark)
        if _contrast(paper, ink) >= _LEAST_CONTRAST:
            return (paper[0], paper[1], paper[2]), (ink[0], ink[1], ink[2])


def draw_page(
    lines: Sequence[Line], size: tuple[int, int], paper: Colour, ink: Colour, rng: random.Random
) -> Image.Image:
    """Draw the lines on paper with a gradient, grain or rules."""
    image = _paper(size, paper, ink, rng)
    draw = ImageDraw.Draw(image)
    for line in lines:
        draw.text((line.x, line.y), line.text, fill=ink, font=line.font, anchor="ls")
    return image


def choose_distortion(size: tuple[int, int], rng: random.Random, strength: float) -> Matrix:
    """Draw a map from the flat page to the picture: turned, sheared, seen at an angle, or left as it is.

    Args:
        size: Width and height, pixels.
        rng: Random numbers.
        strength: 0 for none; with 1, up to 3 degrees, and corners off by up to 2.5 % of a side.
    """
    width, height = size
    if strength == 0 or rng.random() < 0.25:
        return np.eye(3)
    corners = [(0, 0), (width, 0), (width, height), (0, height)]
    angle = math.radians(rng.uniform(-3, 3)) * strength
    moved = []
    for x, y in corners:
        dx, dy = x - width / 2, y - height / 2
        jitter = [rng.uniform(-0.025, 0.025) * strength * side for side in size]
        moved.append(
            (
                width / 2 + 0.96 * (dx * math.cos(angle) - dy * math.sin(angle)) + jitter[0],
                height / 2 + 0.96 * (dx * math.sin(angle) + dy * math.cos(angle)) + jitter[1],
            )
        )
    return _homography(corners, moved)


def distort(image: Image.Image, matrix: Matrix, ground: Colour) -> Image.Image:
    """Apply a map; what was outside of the page gets the colour ``ground``."""
    if np.array_equal(matrix, np.eye(3)):
        return image
    back = np.linalg.inv(matrix)
    back /= back[2, 2]
    return image.transform(
        image.size, Image.Transform.PERSPECTIVE, tuple(back.ravel()[:8]), Image.Resampling.BICUBIC, fillcolor=ground
    )


def map_box(matrix: Matrix, box: tuple[float, float, float, float]) -> list[tuple[float, float]]:
    """Return where the corners of a box come to lie, clockwise from the upper left."""
    left, top, right, bottom = box
    points = np.array([(left, top, 1), (right, top, 1), (right, bottom, 1), (left, bottom, 1)])
    mapped = points @ matrix.T
    return [(float(x / w), float(y / w)) for x, y, w in mapped]


def spoil(image: Image.Image, rng: random.Random, strength: float) -> Image.Image:
    """Blur a little, and add the noise of a sensor."""
    if strength == 0:
        return image
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.8) * strength))
    if rng.random() < 0.5:
        noise = np.random.default_rng(rng.getrandbits(64)).normal(0, rng.uniform(1, 6) * strength, image.size[::-1])
        pixels = np.asarray(image, np.float64) + noise[..., None]
        image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    return image


def _paper(size: tuple[int, int], paper: Colour, ink: Colour, rng: random.Random) -> Image.Image:
    width, height = size
    kind = rng.choice(("plain", "gradient", "grain", "grain", "rules"))
    pixels = np.empty((height, width, 3))
    pixels[:] = paper
    if kind == "gradient":
        y, x = np.mgrid[0:height, 0:width]
        angle = rng.uniform(0, 2 * math.pi)
        slope = (x / width - 0.5) * math.cos(angle) + (y / height - 0.5) * math.sin(angle)
        pixels += slope[..., None] * rng.uniform(8, 26)
    elif kind == "grain":
        fine = np.random.default_rng(rng.getrandbits(64))
        coarse = fine.normal(0, rng.uniform(2, 6), (height // 4 + 1, width // 4 + 1))
        pixels += np.kron(coarse, np.ones((4, 4)))[:height, :width, None]
    image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    if kind == "rules":
        draw = ImageDraw.Draw(image)
        faint = tuple(round(0.85 * p + 0.15 * i) for p, i in zip(paper, ink, strict=True))
        for y in range(rng.randint(10, 30), height, rng.randint(18, 40)):
            draw.line((0, y, width, y), fill=faint)
    return image


def _homography(source: Sequence[tuple[float, float]], target: Sequence[tuple[float, float]]) -> Matrix:
    """The projective map that takes four points to four others."""
    rows, values = [], []
    for (x, y), (u, v) in zip(source, target, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    solved = np.linalg.solve(np.array(rows, np.float64), np.array(values, np.float64))
    return np.append(solved, 1.0).reshape(3, 3)


def _contrast(first: Sequence[int], second: Sequence[int]) -> float:
    bright, dark = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def _luminance(colour: Sequence[int]) -> float:
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
