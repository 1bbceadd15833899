"""What finds the boxes in answers to a question, as parts of the picture that it shows."""

from __future__ import annotations

from megavlm.data.box_notations import find_boxes
from megavlm.data.box_space import BoxSpace, ReadBoxes
from megavlm.data.images import ImageError, upright_size
from megavlm.data.machine import is_machine_fault
from megavlm.evaluation.benchmarks.spec import Item, StoredFilm, picture_bytes


def reader_of(item: Item, space: BoxSpace | None) -> ReadBoxes:
    """Return what finds boxes in the answers to a question; they are of its first picture.

    Args:
        item: the question. A picture of it that cannot be opened, or that the model cannot have, is told where it is
            asked, and counts as wrong; boxes of it are parts of its sides.
        space: what boxes count; None where they count parts of the picture.

    Raises:
        OSError: the machine fails as a picture is read.
    """
    if space is None or not (space.pixels or space.plane):
        return find_boxes
    first = next((one for one in item.pictures if not isinstance(one, StoredFilm)), None)
    try:
        # What the model sees is made of the file: a benchmark's words on its size may be of the picture as published.
        size = None if first is None else upright_size(picture_bytes(first))
    except (ImageError, OSError) as error:
        if is_machine_fault(error):
            raise
        size = None if item.box is None else item.size
    try:
        return find_boxes if size is None else space.of(size)
    except ImageError:
        return find_boxes
