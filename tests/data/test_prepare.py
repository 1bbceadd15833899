"""Prepare keeps what is sound, reports what is not, and never leaves a half-written directory."""

import io
import json
import logging
import tarfile
from pathlib import Path

import pytest
from data_helpers import encode_image, make_records, prepare, smooth_image
from PIL import Image


def members(out: Path) -> dict[str, bytes]:
    found = {}
    for shard in sorted(out.glob("shard-*.tar")):
        with tarfile.open(shard) as tar:
            found |= {m.name: tar.extractfile(m).read() for m in tar}
    return found


def chat(value: str) -> dict:
    return {"conversations": [{"from": "user", "value": value}, {"from": "assistant", "value": "ok"}]}


def test_shards_hold_raw_bytes_and_energon_metadata(tmp_path: Path) -> None:
    images = tmp_path / "images"
    records = make_records(images, 25)
    out = prepare(tmp_path, records, name="set", images=images, samples_per_shard=10)
    assert [p.name for p in sorted(out.glob("*.tar"))] == [f"shard-{i:06d}.tar" for i in range(3)]
    found = members(out)
    for i, record in enumerate(records):
        assert json.loads(found[f"set-{i:08d}.json"]) == record
        for j in range(record["conversations"][0]["value"].count("<img>")):
            assert found[f"set-{i:08d}.img{j}"] == (images / f"{i}-{j}.jpg").read_bytes()
    info = json.loads((out / ".nv-meta" / ".info.json").read_text())
    assert list(info["shard_counts"].values()) == [10, 10, 5]
    assert {p.name for p in (out / ".nv-meta").iterdir()} >= {"index.sqlite", "split.yaml", "dataset.yaml"}
    assert (out / "rejected.jsonl").read_text() == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "set", "set.json"]


def test_bad_records_are_reported_and_the_rest_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = tmp_path / "images"
    images.mkdir()
    good = encode_image(Image.new("RGB", (40, 30)))
    (images / "good.jpg").write_bytes(good)
    (images / "html.jpg").write_bytes(b"<html>404</html>")
    (images / "empty.png").write_bytes(b"")
    whole = encode_image(smooth_image(0, 300, 200))
    (images / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    bomb = bytearray(encode_image(Image.new("RGB", (8, 8)), "PNG"))
    bomb[16:24] = (50_000).to_bytes(4, "big") * 2
    (images / "bomb.png").write_bytes(bomb)
    (tmp_path / "secret.jpg").write_bytes(good)
    (images / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    names = ["good.jpg", "no.jpg", "html.jpg", "empty.png", "cut.jpg", "bomb.png", "link.jpg", "../secret.jpg"]
    records = [chat(f"<img>{name}</img>") for name in names] + ["?", chat("text only")]
    with caplog.at_level(logging.INFO):
        out = prepare(tmp_path, records, name="set", images=images)
    assert sorted(members(out)) == ["set-00000000.img0", "set-00000000.json", "set-00000009.json"]
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [r["index"] for r in rejected] == list(range(1, 9))
    reasons = ["does not exist", "not an image", "empty", "decode error|truncated", "too large", "leads out of"]
    reasons += ["leaves the image directory", "must be an object"]
    for got, want in zip(rejected, reasons, strict=True):
        assert any(w in got["reason"] for w in want.split("|")), got
    assert "2 samples with 1 images in 1 shards; 8 rejected" in caplog.text


def test_links_out_of_the_images_are_followed_only_if_allowed(tmp_path: Path) -> None:
    (tmp_path / "coco").mkdir()
    good = encode_image(Image.new("RGB", (40, 30)))
    (tmp_path / "coco" / "a.jpg").write_bytes(good)
    images = tmp_path / "images"
    images.mkdir()
    (images / "coco").symlink_to(tmp_path / "coco")
    records = [chat("<img>coco/a.jpg</img>"), chat("<img>../coco/a.jpg</img>")]
    with pytest.raises(ValueError, match="by a link; --allow-links follows it"):
        prepare(tmp_path, records, name="set", images=images)
    out = prepare(tmp_path, records, name="set", images=images, allow_links=True)
    assert members(out)["set-00000000.img0"] == good
    (rejected,) = (out / "rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected)["cause"] == "unsafe image path"


def test_nothing_usable_or_wrong_arguments_leave_nothing_behind(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    with pytest.raises(ValueError, match="all 1 records are rejected; first: turn 0"):
        prepare(tmp_path, [chat("")], name="set", images=images)
    with pytest.raises(FileNotFoundError, match="image directory"):
        prepare(tmp_path, [chat("a")], name="set", images=tmp_path / "no")
    with pytest.raises(ValueError, match="--samples-per-shard"):
        prepare(tmp_path, [chat("a")], name="set", images=images, samples_per_shard=0)
    with pytest.raises(ValueError, match="list of records"):
        prepare(tmp_path, [], name="set", images=images)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "set.json"]


def test_existing_output_is_kept_unless_overwritten(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    out = prepare(tmp_path, [chat("first")], name="set", images=images)
    with pytest.raises(ValueError, match="--overwrite"):
        prepare(tmp_path, [chat("second")], name="set", images=images)
    assert b"first" in members(out)["set-00000000.json"]
    prepare(tmp_path, [chat("second")], name="set", images=images, overwrite=True)
    assert b"second" in members(out)["set-00000000.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "set", "set.json"]


def test_resize_re_encodes_only_large_jpegs(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    small, large = (encode_image(Image.new("RGB", size, (9, 99, 199))) for size in [(60, 40), (200, 100)])
    (images / "s.jpg").write_bytes(small)
    (images / "l.jpg").write_bytes(large)
    out = prepare(tmp_path, [chat("<img>s.jpg</img><img>l.jpg</img>")], name="set", images=images, resize=100)
    found = members(out)
    assert found["set-00000000.img0"] == small
    assert Image.open(io.BytesIO(found["set-00000000.img1"])).size == (100, 50)
