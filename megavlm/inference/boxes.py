"""Boxes in answers, drawn on the picture that they speak of."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from megavlm.data.boxes import parse_boxes
from megavlm.data.images import decode_with_pil

_COLOURS = ((214, 39, 40), (31, 119, 180), (44, 160, 44), (255, 127, 14), (148, 103, 189), (23, 190, 207))


def draw_boxes(image: bytes, answer: str) -> Image.Image | None:
    """Return the picture, upright, with the boxes of ``answer`` on it, each in a colour of its own and with its name.

    Args:
        image: an image file.
        answer: text with ``<ref>name</ref><box>(x1,y1),(x2,y2)</box>``, in thousandths of the sides.

    Returns:
        The picture in RGB, or None where the answer has no box.
    """
    boxes = parse_boxes(answer)
    if not boxes:
        return None
    picture = decode_with_pil(image)
    draw = ImageDraw.Draw(picture)
    width, height = picture.size
    thick = max(2, min(width, height) // 150)
    font = ImageFont.load_default(max(12, min(width, height) // 28))
    for index, (name, (x1, y1, x2, y2)) in enumerate(boxes):
        colour = _COLOURS[index % len(_COLOURS)]
        corners = (x1 * width / 1000, y1 * height / 1000, x2 * width / 1000, y2 * height / 1000)
        draw.rectangle(corners, outline=colour, width=thick)
        if name:
            left, top, right, bottom = draw.textbbox((corners[0], corners[1]), name, font=font)
            up = min(bottom - corners[1], corners[1])  # above the box where there is room
            draw.rectangle((left - 1, top - up - 1, right + 1, bottom - up + 1), fill=colour)
            draw.text((corners[0], corners[1] - up), name, fill="white", font=font)
    return picture
