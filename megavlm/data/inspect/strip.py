"""Films on the pages of ``inspect`` and ``eval``: some of the frames that the tower sees, each with its time."""

from __future__ import annotations

import base64
import io
from html import escape

from PIL import Image

from megavlm.data.films.film import Film
from megavlm.data.films.plan import FilmLayout
from megavlm.data.image_colours import Alpha
from megavlm.data.image_header import ImageError
from megavlm.data.media import ImageLayout

_FRAMES, _SIDE = 12, 96
"""Frames of a film that are shown, and their longer side in pixels."""


def some_frames(film: Film, layout: ImageLayout, alpha: Alpha, most: int) -> list[tuple[float, Image.Image]]:
    """Return frames that the tower sees, spread over all of these, with their seconds from the first frame.

    Args:
        film: The film.
        layout: Its layout.
        alpha: What becomes of transparency.
        most: So many at most.

    Raises:
        FilmError: One cannot be decoded.
    """
    from megavlm.data.films.read import frames_of  # noqa: PLC0415 - torch

    assert isinstance(layout, FilmLayout)
    shown = sorted(set(layout.indices))
    count = min(len(shown), most)
    some = [shown[index * len(shown) // count] for index in range(count)]
    frames = frames_of(film, some, alpha)
    return [
        (index / layout.film.rate, Image.fromarray(frame.permute(1, 2, 0).numpy()))
        for index, frame in zip(some, frames, strict=True)
    ]


def filmstrip(film: Film, layout: ImageLayout, alpha: Alpha, name: str) -> str:
    """Return a film as HTML; one that cannot be decoded is told of."""
    assert isinstance(layout, FilmLayout)
    try:
        some = some_frames(film, layout, alpha, _FRAMES)
    except ImageError as error:
        return f'<div class="picture broken">{name}: {escape(str(error))}</div>'
    shape, shown = layout.film, len(set(layout.indices))
    facts = f"{name}, {shape.width} x {shape.height}, {shape.frames} frames, {shape.rate:.4g} a second; {shown} shown"
    facts += f", {len(some)} of these here" if len(some) < shown else ""
    parts = [f"<div>{_img(image, f'{name} at {at:.2f} s')}<span>{at:.2f} s</span></div>" for at, image in some]
    return f'<div class="picture"><div class="strip">{"".join(parts)}</div><span>{escape(facts)}</span></div>'


def _img(image: Image.Image, name: str) -> str:
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    zoom = max(1, _SIDE // max(image.size))
    url = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<img src="{url}" width="{image.width * zoom}" height="{image.height * zoom}" alt="{escape(name)}">'
