"""Boxes in answers, drawn on the picture that they speak of."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from megavlm.checkpoint.assets import read_record
from megavlm.config.schema import ModelConfig
from megavlm.data.box_notations import find_boxes
from megavlm.data.images import decode_with_pil
from megavlm.data.media import ImagePlan, plan_of
from megavlm.families.family import Family
from megavlm.families.registry import FAMILIES

_COLOURS = ((214, 39, 40), (31, 119, 180), (44, 160, 44), (255, 127, 14), (148, 103, 189), (23, 190, 207))


def family_of(checkpoint: Path) -> Family | None:
    """Return the family that a checkpoint's record names, or None where it was made by training alone."""
    record = read_record(checkpoint)
    return FAMILIES.get(str(record.get("home") or record.get("family")))


def pixel_plan(checkpoint: Path, model: ModelConfig) -> ImagePlan | None:
    """Return the image plan of a model whose ``bbox_2d`` counts the pixels that it sees; None for thousandths."""
    family = family_of(checkpoint)
    return plan_of(model) if family is not None and family.box_pixels else None


def draw_boxes(image: bytes, answer: str, pixels: ImagePlan | None = None) -> Image.Image | None:
    """Return the picture, upright, with the boxes of ``answer`` on it, each in a colour of its own and with its name.

    Args:
        image: an image file.
        answer: text with boxes in any notation that is known (:mod:`megavlm.data.box_notations`).
        pixels: of :func:`pixel_plan`.

    Returns:
        The picture in RGB, or None where the answer has no box.
    """
    picture = decode_with_pil(image)
    size = pixels.plan(*picture.size).canvases[0].resized if pixels is not None else None
    boxes = find_boxes(answer, pixels_of=size)
    if not boxes:
        return None
    draw = ImageDraw.Draw(picture)
    width, height = picture.size
    thick = max(2, min(width, height) // 150)
    font = ImageFont.load_default(max(12, min(width, height) // 28))
    for index, (name, (x1, y1, x2, y2)) in enumerate(boxes):
        colour = _COLOURS[index % len(_COLOURS)]
        corners = (x1 * width, y1 * height, x2 * width, y2 * height)
        draw.rectangle(corners, outline=colour, width=thick)
        if name:
            left, top, right, bottom = draw.textbbox((corners[0], corners[1]), name, font=font)
            up = min(bottom - corners[1], corners[1])  # above the box where there is room
            draw.rectangle((left - 1, top - up - 1, right + 1, bottom - up + 1), fill=colour)
            draw.text((corners[0], corners[1] - up), name, fill="white", font=font)
    return picture
