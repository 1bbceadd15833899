"""Pictures as the model sees them, as HTML, for the pages of ``inspect`` and ``eval``, which run no script.

Planes have the pixels that they really get; the borders of views and blocks are drawn over them, and padding is shaded.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from html import escape
from pathlib import Path

from PIL import Image

from megavlm.data.image_header import ImageError
from megavlm.data.media import ImagePlan
from megavlm.data.seen import SeenPlane, said, seen

LOOK = Path(__file__).with_name("look.css").read_text(encoding="utf-8")
"""Colours of both schemes, the switch between them, and what :func:`planes` needs."""
SWITCH = '<input type="checkbox" id="scheme"><label for="scheme" class="scheme">light / dark</label>'
"""Changes the scheme; the style sheet alone does it."""
_SIDE = 260
"""Longer side of a plane, in pixels."""
_MOST_BLOCKS = 48
"""With more blocks along a side their borders would hide the picture."""


def planes(picture: Image.Image, plan: ImagePlan, images: int = 1) -> str:
    """Return the planes of a picture.

    Args:
        picture: upright, in RGB, at its own size.
        plan: what becomes of it.
        images: pictures that its conversation shows.
    """
    try:
        layout = plan.plan(*picture.size, images)
    except ImageError as error:
        return f'<p class="facts">The model cannot have it: {escape(str(error))}</p>'
    parts = []
    for plane, canvas in zip(seen(plan, layout), layout.canvases, strict=True):
        from megavlm.data.render import canvas_with_pil  # noqa: PLC0415 - imports torch

        pixels = canvas_with_pil(picture, plan, canvas)
        pixels.thumbnail((_SIDE, _SIDE))
        file = io.BytesIO()
        pixels.save(file, "JPEG", quality=80)
        url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        scale = max(1.0, 0.6 * _SIDE / max(pixels.size))
        width, height = round(pixels.width * scale), round(pixels.height * scale)
        marks = "".join(_marks(plane))
        parts.append(
            f'<div class="plane"><img src="{url}" width="{width}" height="{height}" alt="">'
            f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none">{marks}</svg></div>'
        )
    return f'<div class="seen"><div class="planes">{"".join(parts)}</div><p>{escape(said(plan, layout))}</p></div>'


def _marks(plane: SeenPlane) -> Iterator[str]:
    """Yield what is drawn over a plane, in thousandths of its sides."""
    left, top, width, height = plane.picture
    if plane.padded:
        inside = [max(0.0, left), max(0.0, top), min(1.0, left + width), min(1.0, top + height)]
        x1, y1, x2, y2 = (1000 * side for side in inside)
        around = f"M0 0H1000V1000H0ZM{x1:.1f} {y1:.1f}V{y2:.1f}H{x2:.1f}V{y1:.1f}Z"
        yield f'<path class="pad" fill-rule="evenodd" d="{around}"><title>padding</title></path>'
    if plane.blocks is not None and max(plane.blocks) <= _MOST_BLOCKS:
        columns, rows = plane.blocks
        lines = [f"M{1000 * column / columns:.1f} 0V1000" for column in range(1, columns)]
        lines += [f"M0 {1000 * row / rows:.1f}H1000" for row in range(1, rows)]
        yield f'<path class="block" d="{"".join(lines)}"/>'
    if len(plane.views) > 1:
        for kind in ("cut rim", "cut"):
            for x, y, across, down in plane.views:
                yield (
                    f'<rect class="{kind}" x="{1000 * x:.1f}" y="{1000 * y:.1f}" width="{1000 * across:.1f}" '
                    f'height="{1000 * down:.1f}"/>'
                )
