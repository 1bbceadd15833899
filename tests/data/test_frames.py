"""Boxes and their pictures are in one frame, whichever way the picture was held."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from data_helpers import encode_image
from PIL import Image, ImageOps

from megavlm.data.box_notations import find_boxes
from megavlm.data.formats import Broken, Source, choose
from megavlm.data.frames import Frame, frame_of
from megavlm.data.images import decode_with_pil
from megavlm.evaluation.benchmarks import spec
from megavlm.evaluation.benchmarks.pictures import read_refcoco

BOX = (6, 8, 30, 14)
TURNS = range(1, 9)


def picture(turn: int, kind: str = "JPEG") -> bytes:
    """A red box on blue, which stands as ``turn`` says."""
    image = Image.new("RGB", (64, 32), (0, 0, 255))
    image.paste((255, 0, 0), BOX)
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    return encode_image(image, kind, **({"tiffinfo": {0x0112: turn}} if kind == "TIFF" else {"exif": exif}), **options)


def is_red(data: bytes, thousandths: tuple[int, ...]) -> bool:
    """Whether a box in thousandths holds the red of the upright picture, and next to nothing else."""
    pixels = np.asarray(decode_with_pil(data)).astype(int)
    height, width = pixels.shape[:2]
    x1, y1, x2, y2 = (round(v * side / 1000) for v, side in zip(thousandths, (width, height) * 2, strict=True))
    red = (pixels[..., 0] > 128) & (pixels[..., 2] < 128)
    return red[y1:y2, x1:x2].mean() > 0.95 and red.sum() - red[y1:y2, x1:x2].sum() < 4


@pytest.mark.parametrize("turn", TURNS)
def test_points_go_where_pil_puts_them(turn: int) -> None:
    mark = Image.new("L", (64, 32))
    mark.putpixel((5, 20), 255)
    exif = Image.Exif()
    exif[0x0112] = turn
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(encode_image(mark, "PNG", exif=exif))))
    frame = Frame(64, 32, turn)
    (y,), (x,) = np.nonzero(np.asarray(upright))
    assert frame.upright == upright.size
    assert frame.point(5.5, 20.5) == (x + 0.5, y + 0.5)


@pytest.mark.parametrize(
    ("turn", "info"),
    # The sides of a picture that is only mirrored, or upside down, do not tell: its boxes are those of the stored one.
    [(turn, info) for turn in TURNS for info in ("stored", "upright", "half", None) if info != "upright" or turn > 4],
)
def test_regions_turn_with_their_picture(turn: int, info: str | None, tmp_path: Path) -> None:
    data = picture(turn)
    (tmp_path / "1.jpg").write_bytes(data)
    x1, y1, x2, y2 = BOX
    width, height = 64, 32
    if info == "upright":
        x1, y1, x2, y2 = Frame(64, 32, turn).box(*BOX)
        width, height = (int(side) for side in Frame(64, 32, turn).upright)
    elif info == "half":
        x1, y1, x2, y2, width, height = (value / 2 for value in (*BOX, width, height))
    region = {"region_id": 1, "phrase": "the red", "x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1}
    (tmp_path / "r.json").write_text(json.dumps([{"id": 1, "regions": [region]}]))
    options = {}
    if info is not None:
        options["image_info"] = tmp_path / "i.json"
        options["image_info"].write_text(json.dumps([{"image_id": 1, "width": width, "height": height}]))
    source = Source(tmp_path / "r.json", tmp_path, **options)
    (record,) = choose(source, "vg-regions").load().read(source)
    found = tuple(map(int, re.findall(r"\d+", record["conversations"][1]["value"])))
    assert is_red(data, found), (found, record)


@pytest.mark.parametrize("boxes", ["qwen_vl", "minigpt_v2", "cogvlm"])
def test_regions_turn_in_every_notation(boxes: str, tmp_path: Path) -> None:
    for turn in (1, 2, 6, 7):
        data = picture(turn)
        (tmp_path / "1.jpg").write_bytes(data)
        x1, y1, x2, y2 = BOX
        region = {"region_id": 1, "phrase": "the red", "x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1}
        (tmp_path / "r.json").write_text(json.dumps([{"id": 1, "regions": [region]}]))
        source = Source(tmp_path / "r.json", tmp_path, boxes=boxes)
        (record,) = choose(source, "vg-regions").load().read(source)
        ((_, sides),) = find_boxes(record["conversations"][1]["value"])
        if boxes == "minigpt_v2":  # hundredths, rounded down, of sides of 32 and 64 pixels
            sides = (sides[0], sides[1], sides[2] + 0.01, sides[3] + 0.01)
        assert is_red(data, tuple(round(1000 * side) for side in sides)), (turn, record)


@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_lines_of_pages_and_boxes_of_refcoco_too(turn: int, tmp_path: Path) -> None:
    data = picture(turn)
    (tmp_path / "p.jpg").write_bytes(data)
    x1, y1, x2, y2 = BOX
    truth = {"size": [64, 32], "lines": [{"text": "red", "quad": [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]}]}
    (tmp_path / "m.jsonl").write_text(json.dumps({"file_name": "p.jpg", "ground_truth": json.dumps(truth)}))
    source = Source(tmp_path / "m.jsonl", tmp_path)
    (record,) = choose(source, "synthdog").load().read(source)
    corners = [int(n) for n in re.findall(r"\d+", record["conversations"][1]["value"])]
    assert is_red(data, (min(corners[::2]), min(corners[1::2]), max(corners[::2]), max(corners[1::2])))
    line = {"image": "p.jpg", "sent": "red", "bbox": BOX, "width": 64, "height": 32}
    (tmp_path / "refcoco_val.jsonl").write_text(json.dumps(line))
    (item,) = read_refcoco(spec.BenchmarkFiles(tmp_path / "refcoco_val.jsonl", tmp_path))
    assert item.size == ((32, 64) if turn >= 5 else (64, 32))
    assert is_red(data, tuple(round(v * 1000 / side) for v, side in zip(item.box, item.size * 2, strict=True)))


def test_other_formats_of_pictures(tmp_path: Path) -> None:
    for kind in ("PNG", "WEBP", "TIFF"):
        data = picture(6, kind)
        frame = frame_of(data)
        assert (frame.width, frame.height, frame.turn) == (64, 32, 6), kind
        assert frame.upright == decode_with_pil(data).size
    (tmp_path / "1.jpg").write_bytes(b"no picture")
    (tmp_path / "r.json").write_text(json.dumps([{"id": 1, "regions": [{"phrase": "x"}]}]))
    source = Source(tmp_path / "r.json", tmp_path)
    assert list(choose(source, "vg-regions").load().read(source)) == [
        Broken(1, "bad image (not an image)", "image '1.jpg': not an image")
    ]
