"""Keys beside a conversation: used where a form defines them, refused where the training would miss them, told else."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import pytest
from data_helpers import encode_image, prepare
from PIL import Image
from test_data_formats import read

from megavlm.data.formats.base import BrokenError
from megavlm.data.formats.qwen_vl import conversation
from megavlm.data.schema import parse_conversation


def llava(**keys: object) -> dict:
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A flag."}]
    return {"id": "r", "conversations": turns} | keys


def qwen(**keys: object) -> dict:
    turns = [{"from": "user", "value": "<img>a.jpg</img>What?"}, {"from": "assistant", "value": "A flag."}]
    return {"id": "r", "conversations": turns} | keys


SHOWN = "Picture 1: <img>a.jpg</img>\nWhat is this?"


def test_images_are_pictures_as_image_is(tmp_path: Path) -> None:
    for keys in ({"images": ["a.jpg"]}, {"images": "a.jpg"}, {"image": "a.jpg", "images": ["a.jpg"]}):
        assert read(tmp_path / "d.json", [llava(**keys)], tmp_path)[0] == [("r", None, SHOWN, "A flag.")], keys
    broken = {
        "no <image> in the text": qwen(images=["a.jpg"]) | {"conversations": [
            {"from": "human", "value": "What is this?"}, {"from": "gpt", "value": "A flag."}]},
        "two names": llava(image="a.jpg", images=["b.jpg"]),
        "too many": llava(images=["a.jpg", "b.jpg"]),
        "none": llava(images=[]),
    }  # fmt: skip
    for name, record in broken.items():
        assert read(tmp_path / "d.json", [record], tmp_path, "llava") == ([], [("r", "pictures do not match")]), name
    # Beside turns that show pictures themselves, it is not clear which are meant.
    records, told = read(tmp_path / "q.json", [qwen(), qwen(images=["b.jpg"])], tmp_path, "qwen-vl")
    assert len(records) == 1 and told == [("r", "pictures do not match")]


def test_codefuse_rows_have_the_keys_too(tmp_path: Path) -> None:
    row = {"prompt": "What?", "ground_truth": "A flag.", "images": ["a.jpg"], "system": "Answer in French."}
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "d.parquet")
    records, broken = read(tmp_path / "d.parquet", None, tmp_path)
    assert broken == []
    assert records[0][2:] == ("Answer in French.", "Picture 1: <img>a.jpg</img>\nWhat?", "A flag.")


def test_system_is_the_first_turn(tmp_path: Path) -> None:
    for record in (llava(image="a.jpg"), qwen()):
        before = read(tmp_path / "d.json", [record], tmp_path)[0][0]
        after = read(tmp_path / "d.json", [record | {"system": "Answer in French."}], tmp_path)[0][0]
        assert after == (*before[:2], "Answer in French.", *before[2:])
        spoken = [{"from": "system", "value": "Answer in French."}, *record["conversations"]]
        same = record | {"system": "Answer in French.", "conversations": spoken}
        assert read(tmp_path / "d.json", [same], tmp_path)[0] == [after]
        for system in ("Answer in Polish.", ["x"], 7):
            other = same | {"system": system}
            assert read(tmp_path / "d.json", [other], tmp_path)[1] == [("r", "bad record")]
        for system in ("", None):
            assert read(tmp_path / "d.json", [record | {"system": system}], tmp_path)[0] == [before]


@pytest.mark.parametrize(
    "keys", [{"audios": ["a.wav"]}, {"audio": "a.wav"}, {"tools": "[{}]"}, {"history": [["a", "b"]]}, {"chosen": "x"}]
)
def test_what_would_be_missing_is_refused(keys: dict, tmp_path: Path) -> None:
    for record in (llava(image="a.jpg"), qwen()):
        assert read(tmp_path / "d.json", [record | keys], tmp_path)[1] == [("r", "unsupported key")]
        empty = {key: type(value)() for key, value in keys.items()}
        assert read(tmp_path / "d.json", [record | empty], tmp_path)[1] == []


def test_keys_of_turns_count_as_well(tmp_path: Path) -> None:
    def spoken(**keys: object) -> dict:
        record = qwen()
        record["conversations"][1] |= keys
        return record

    for keys in ({"image": "b.jpg"}, {"tool_calls": [1]}, {"loss_scale": 2.0}):
        assert read(tmp_path / "d.json", [spoken(**keys)], tmp_path)[1] == [("r", "unsupported key")], keys
    for keys in ({"weight": -1}, {"loss": "false"}, {"weight": float("nan")}, {"weight": 0, "loss": True}):
        assert read(tmp_path / "d.json", [spoken(**keys)], tmp_path)[1] == [("r", "bad weight")], keys
    for keys in ({"weight": 1}, {"loss": True}, {"train": None}, {"image": None}, {"weight": 0.5}, {"loss": False}):
        assert read(tmp_path / "d.json", [spoken(**keys)], tmp_path)[1] == [], keys
    asked = qwen()
    asked["conversations"][0] |= {"train": True}  # a question is never trained on
    assert read(tmp_path / "d.json", [asked], tmp_path)[1] == [("r", "bad weight")]
    for keys in ({"weight": 0}, {"loss": 0.5}, {"train": False}):
        assert read(tmp_path / "d.json", [qwen(**keys)], tmp_path)[1] == [("r", "unsupported key")], keys


def test_keys_that_nobody_looks_at_are_told_with_their_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jpg").write_bytes(encode_image(Image.new("RGB", (8, 8))))
    records = [qwen(model="x"), qwen(model="y", origin="z"), qwen(model=""), qwen(answer="A flag.")]
    records[0]["conversations"][0]["time"] = 3
    with caplog.at_level(logging.WARNING):
        prepare(tmp_path, records, name="set", images=tmp_path)
    assert "keys of the records that are not used: model (2 records), " in caplog.text
    assert "origin (1 records)" in caplog.text and "time (of a turn) (1 records)" in caplog.text
    assert "answer" not in caplog.text


def test_shards_of_others_are_not_trained_on_without_what_they_name() -> None:
    for key, value in (("images", ["a.jpg"]), ("image", "a.jpg"), ("system", "Be brief."), ("videos", ["a.mp4"])):
        with pytest.raises(
            ValueError, match=f"'{key}' beside the conversation is another format's; run megavlm prepare"
        ):
            parse_conversation(qwen(**{key: value}))
    assert parse_conversation(qwen(image=None, system="")).images == ("a.jpg",)


def test_line_ends_behind_image_are_the_tag_s(tmp_path: Path) -> None:
    for end in ("\r\n", "\n", "\r", " \r\n", ""):
        record = llava(image="a.jpg")
        record["conversations"][0]["value"] = f"<image>{end}What is this?"
        assert read(tmp_path / "d.json", [record], tmp_path)[0] == [("r", None, SHOWN, "A flag.")], repr(end)
    record["conversations"][0]["value"] = "What is this?\r\n<image>"
    assert read(tmp_path / "d.json", [record], tmp_path)[0][0][2] == "What is this?\r\nPicture 1: <img>a.jpg</img>"


def test_one_record_in_either_form() -> None:
    ignored: Counter[str] = Counter()
    found = conversation(llava(images=["a.jpg"], system="S", answer="flag", model="m"), ignored)
    assert [turn["value"] for turn in found["conversations"]] == ["S", SHOWN, "A flag."]
    assert found["answer"] == "flag" and ignored == {"model": 1} and parse_conversation(found).images == ("a.jpg",)
    assert conversation("?", ignored) == "?"
    with pytest.raises(BrokenError, match="more <image> than the record has pictures"):
        conversation(llava(), ignored)
    assert json.dumps(qwen()) == json.dumps(conversation(qwen(), ignored))
