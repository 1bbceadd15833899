"""Boxes in answers, drawn on the picture that they speak of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from megavlm.checkpoint.assets import read_record
from megavlm.config.schema import ModelConfig
from megavlm.data.box_notations import find_boxes
from megavlm.data.box_space import BoxSpace
from megavlm.data.box_words import NOTATIONS, QWEN_VL_BOXES
from megavlm.data.images import decode_with_pil
from megavlm.data.media import plan_of
from megavlm.data.templates import find_template, is_checkpoint
from megavlm.families.registry import FAMILIES

if TYPE_CHECKING:
    from megavlm.families.family import Family  # imports torch

_COLOURS = ((214, 39, 40), (31, 119, 180), (44, 160, 44), (255, 127, 14), (148, 103, 189), (23, 190, 207))


def family_of(checkpoint: Path) -> Family | None:
    """Return the family that a checkpoint's record names, or None where it was made by training alone."""
    record = read_record(checkpoint)
    name = record.get("home") or record.get("family")
    return None if name is None else FAMILIES.get(str(name))  # whose files, and torch, are imported for a name alone


def box_space(family: Family | None, model: ModelConfig) -> BoxSpace:
    """Return what boxes count in a model of a family (of :func:`family_of`)."""
    plan = plan_of(model)
    return BoxSpace(plan) if family is None else BoxSpace(plan, family.box_pixels, family.box_plane)


def own_question(family: Family | None, model: ModelConfig) -> str | None:
    """Return how a model was taught to be asked for the box of ``{thing}``, in a turn of a conversation.

    What its template was taught counts; of one that models of several notations share, what its family says.

    Returns:
        The question; None where nothing says one, and where boxes are Qwen-VL's, which are asked for in plain text.
    """
    taught = "" if is_checkpoint(model.template) else find_template(model.template).boxes
    if taught == QWEN_VL_BOXES.name:
        return None
    if taught in NOTATIONS:
        return NOTATIONS[taught].asks
    return None if family is None else family.finds


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
    boxes = find_boxes(answer) if space is None else space.of(picture.size)(answer)
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
