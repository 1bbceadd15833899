"""Finding things in pictures and describing them: RefCOCO, RefCOCO+, RefCOCOg; Flickr30k, NoCaps, COCO captions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from megavlm.config.errors import UserError
from megavlm.data.frames import Frame, frame_of
from megavlm.data.images import ImageError
from megavlm.data.machine import is_file
from megavlm.evaluation.benchmarks.files import (
    listed,
    make_items,
    number,
    objects,
    picture_in,
    read_json,
    read_lines,
    text,
)
from megavlm.evaluation.benchmarks.spec import BenchmarkFiles, Item

_PICKLES = (".p", ".pkl", ".pickle")
"""RefCOCO's authors publish refs(unc).p and its like."""
_FARTHEST = 1e6
"""Pixels from the corner of a picture, beyond which no box lies."""


def read_refcoco(source: BenchmarkFiles) -> list[Item]:
    """Read ``refcoco_testA.jsonl`` and its like as Qwen-VL publishes them (eval_mm/EVALUATION.md).

    A line has ``image``, ``sent``, ``bbox`` (x1, y1, x2, y2 in pixels), ``height`` and ``width``. The picture is
    looked for under its whole path, or under its last parts.

    Raises:
        MissingFileError: the file is missing.
        UserError: it is not of this format.
    """

    def make(pair: tuple[int, Any]) -> Iterator[Item]:
        index, entry = pair
        box = entry.get("bbox") if isinstance(entry, dict) else None
        # Neither true nor NaN is a place, and what no picture has would overflow as it is drawn.
        if not isinstance(box, list) or len(box) != 4 or not all(
            type(side) in (int, float) and abs(side) < _FARTHEST for side in box
        ):  # fmt: skip
            raise UserError("has no box of four numbers 'bbox'")
        size = number(entry, "width"), number(entry, "height")
        if min(size) < 1:
            raise UserError(f"its picture is {size[0]} x {size[1]} pixels")
        x1, y1, x2, y2 = (float(side) for side in box)
        picture = _found(source.images, text(entry, "image"))
        frame = Frame(*size, _turn(picture, *size))
        width, height = frame.upright
        yield Item(
            id=str(index),
            question=text(entry, "sent"),
            pictures=(picture,),
            box=frame.box(x1, y1, x2, y2),
            size=(int(width), int(height)),
        )

    if source.data.suffix in _PICKLES:
        raise UserError(f"{source.data}: a pickle can run any program when it is opened; take Qwen-VL's JSON lines")
    rows = ((line, (index, entry)) for index, (line, entry) in enumerate(read_lines(source.data)))
    return make_items(source.data, rows, make, "line")


@lru_cache(4096)  # several questions are of one picture
def _turn(picture: Path, width: int, height: int) -> int:
    """How a picture's boxes turn with it, as EXIF counts; not at all where it cannot be opened, which is told later."""
    if not is_file(picture):
        return 1
    try:
        return frame_of(picture.read_bytes(), width, height).turn
    except ImageError:
        return 1


def _found(directory: Path, name: str) -> Path:
    """The picture at ``name`` in the directory, or at as many of its last parts as are there."""
    whole = picture_in(directory, name)
    parts = Path(name).parts
    candidates = (directory.joinpath(*parts[i:]) for i in range(len(parts)))
    return next((path for path in candidates if path.is_file()), whole)


def read_captions(source: BenchmarkFiles) -> list[Item]:
    """Read captions in COCO's form, or in Karpathy's.

    COCO's (``captions_val2014.json``, ``nocaps_val_4500_captions.json``, Qwen-VL's ``flickr30k_karpathy_test.json``)
    has ``images`` with ``id`` and ``file_name`` (or ``image``), and ``annotations`` with ``image_id`` and
    ``caption``. Karpathy's (``dataset_flickr30k.json``) has ``images`` with ``filename``, ``split`` and
    ``sentences``; its test split is taken unless ``--split`` says otherwise.

    Raises:
        MissingFileError: the file is missing.
        UserError: it is of neither form.
    """
    found = read_json(source.data, dict)
    images = listed(source.data, found, "images")
    if "annotations" not in found and images and isinstance(images[0], dict) and "sentences" in images[0]:
        split = source.split or "test"
        return make_items(source.data, enumerate(images), lambda entry: _karpathy(source, entry, split))
    captions: defaultdict[str, list[str]] = defaultdict(list)
    if source.answers or "annotations" in found:
        for index, entry in enumerate(listed(source.data, found, "annotations")):
            try:
                captions[text(entry, "image_id")].append(text(entry, "caption"))
            except UserError as error:
                raise UserError(f"{source.data}: annotation {index}: {error}") from None

    def make(entry: Any) -> Iterator[Item]:
        key, name = text(entry, "id"), text(entry, "file_name", text(entry, "image", ""))
        domain = text(entry, "domain", "all")
        yield Item(key, "", (_found(source.images, name),), tuple(captions[key]), kind=domain)

    return make_items(source.data, enumerate(images), make)


def _karpathy(source: BenchmarkFiles, entry: Any, split: str) -> Iterator[Item]:
    if text(entry, "split") != split:
        return
    captions = tuple(text(one, "raw") for one in objects(entry, "sentences"))
    name = text(entry, "filename")
    yield Item(text(entry, "imgid", name), "", (_found(source.images, name),), captions)
