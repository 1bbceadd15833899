"""Boxes in answers, drawn on the picture that they speak of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from megavlm.checkpoint.assets import read_record
from megavlm.config.schema import ModelConfig
from megavlm.data.box_notations import FoundBox, find_boxes
from megavlm.data.images import decode_with_pil
from megavlm.data.media import ImageLayout, ImagePlan, plan_of
from megavlm.data.seen import seen
from megavlm.families.family import Family
from megavlm.families.registry import FAMILIES

_COLOURS = ((214, 39, 40), (31, 119, 180), (44, 160, 44), (255, 127, 14), (148, 103, 189), (23, 190, 207))


def family_of(checkpoint: Path) -> Family | None:
    """Return the family that a checkpoint's record names, or None where it was made by training alone."""
    record = read_record(checkpoint)
    return FAMILIES.get(str(record.get("home") or record.get("family")))


@dataclass(frozen=True)
class BoxSpace:
    """What the numbers of a model's boxes count beside thousandths of the picture's sides."""

    plan: ImagePlan
    pixels: bool = False
    """Whether ``bbox_2d`` counts pixels of the picture as the model sees it."""
    plane: bool = False
    """Whether bare numbers are parts of the plane that the picture lies on, its padding with it."""

    def find(self, answer: str, layout: ImageLayout) -> list[FoundBox]:
        """Return the boxes of an answer, as parts of the picture that ``layout`` is of."""
        size = layout.canvases[0].resized if self.pixels else None
        # Of several planes the model sees the whole picture on one: no padding is to be reckoned with.
        place = seen(self.plan, layout)[0].picture if self.plane and len(layout.canvases) == 1 else None
        return find_boxes(answer, pixels_of=size, parts_of=place)


def box_space(family: Family | None, model: ModelConfig) -> BoxSpace:
    """Return what boxes count in a model of a family (of :func:`family_of`)."""
    plan = plan_of(model)
    return BoxSpace(plan) if family is None else BoxSpace(plan, family.box_pixels, family.box_plane)


def draw_boxes(image: bytes, answer: str, space: BoxSpace | None = None) -> Image.Image | None:
    """Return the picture, upright, with the boxes of ``answer`` on it, each in a colour of its own and with its name.

    Args:
        image: an image file.
        answer: text with boxes in any notation that is known (:mod:`megavlm.data.box_notations`).
        space: of :func:`box_space`; None where all boxes count parts of the picture.

    Returns:
        The picture in RGB, or None where the answer has no box.
    """
    picture = decode_with_pil(image)
    boxes = find_boxes(answer) if space is None else space.find(answer, space.plan.plan(*picture.size))
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
