"""Pictures for those who give none: drawn here, not square, with edges and slopes that a mistake would show."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

_SIZES = ((480, 320), (210, 400))


def drawn(directory: Path) -> list[Path]:
    """Write the pictures, a wide and a tall one, and return their paths."""
    paths = []
    for number, (width, height) in enumerate(_SIZES, 1):
        path = directory / f"drawn-{number}.png"
        path.write_bytes(_picture(width, height, number))
        paths.append(path)
    return paths


def _picture(width: int, height: int, number: int) -> bytes:
    """A slope of colour with waves on it, a disc, a box and letters, nothing of it symmetric."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = 0.5 + 0.5 * np.sin(6 * number * x + 9 * y * y)
    colours = np.stack([0.2 + 0.8 * x, 0.3 + 0.6 * waves * (1 - y), 0.9 - 0.7 * y], axis=-1)
    image = Image.fromarray((255 * colours).round().astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.ellipse((0.1 * width, 0.15 * height, 0.4 * width, 0.5 * height), fill=(230, 40, 30))
    draw.rectangle(
        (0.55 * width, 0.6 * height, 0.9 * width, 0.8 * height), fill=(20, 60, 160), outline="white", width=3
    )
    draw.text((0.58 * width, 0.65 * height), f"check {number}", fill="white")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
