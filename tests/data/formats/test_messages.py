"""Messages of several houses, alpaca's questions and LLaMA-Factory's descriptions become the records that they mean."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from data_helpers import encode_image, open_reader, prepare
from PIL import Image
from test_data_formats import read

from megavlm.config.errors import UserError
from megavlm.data.formats import Source, choose
from megavlm.data.tokenizer import Tokenizer

PNG = encode_image(Image.new("RGB", (6, 5), (9, 99, 199)), "PNG")
URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
TEXT = {"type": "text", "text": "What?"}
SHOWN = "Picture 1: <img>a.jpg</img>\nWhat?"


def said(*contents: object, **keys: object) -> dict:
    roles = ("user", "assistant") * len(contents)
    return {"id": "r", "messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]} | keys


SAME = {
    "ms-swift": said("<image>What?", "A flag.", images=["a.jpg"]),
    "no place": said("What?", "A flag.", images=["a.jpg"]),
    "image part": said([{"type": "image", "image": "a.jpg"}, TEXT], [{"type": "text", "text": "A flag."}]),
    "image_url part": said([{"type": "image_url", "image_url": {"url": "a.jpg", "detail": None}}, TEXT], "A flag."),
    "path part": said([{"type": "image", "path": "a.jpg"}, TEXT], "A flag."),
    "file url": said([{"type": "image", "url": "file://a.jpg"}, TEXT], "A flag."),
    "part without a source": said([{"type": "image"}, TEXT], "A flag.", images=["a.jpg"]),
    "part by index": said([{"type": "image", "index": 0, "text": None}, TEXT], "A flag.", images=[{"path": "a.jpg"}]),
    "parts without types": said([{"image": "a.jpg"}, {"text": "What?"}], "A flag."),
    "sharegpt of roles": {
        "id": "r", "images": ["a.jpg"],
        "conversations": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A flag."}],
    },
    "pairs": {"id": "r", "images": ["a.jpg"], "conversation": [{"human": "<image>What?", "assistant": "A flag."}]},
    "alpaca": {"id": "r", "instruction": "<image>What?", "input": "", "output": "A flag.", "images": ["a.jpg"]},
    "query": {"id": "r", "query": "What?", "response": "A flag.", "history": [], "images": ["a.jpg"]},
}  # fmt: skip


@pytest.mark.parametrize("form", SAME)
def test_one_conversation_in_every_form(form: str, tmp_path: Path) -> None:
    for suffix in (".json", ".jsonl"):
        assert read(tmp_path / f"d{suffix}", [SAME[form]], tmp_path) == ([("r", None, SHOWN, "A flag.")], [])


def test_pictures_in_order_of_where_they_are_shown(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Left:"}, {"type": "image", "image": "l.jpg"},
             {"type": "text", "text": " right:<image>"}, {"type": "image", "index": None}, TEXT]  # fmt: skip
    records, broken = read(tmp_path / "d.json", [said(parts, "No.", images=["r.jpg", "x.jpg"])], tmp_path)
    first, second, third = (f"Picture {i + 1}: <img>{n}.jpg</img>\n" for i, n in enumerate("lrx"))
    assert broken == [] and records[0][2] == f"Left:{first} right:{second}{third}What?"  # to the letter
    asked = said("What?", "A flag.", "And <image>?", "A dog.", images=["a.jpg"])
    assert read(tmp_path / "d.json", [asked], tmp_path)[0][0][4] == "And Picture 1: <img>a.jpg</img>\n?"


def test_earlier_questions_and_systems(tmp_path: Path) -> None:
    alpaca = {"id": "r", "instruction": "Sum up.", "input": "A text.", "output": "It.", "system": "Be brief.",
              "history": [["Hi.", "Hello."]], "images": ["a.jpg"]}  # fmt: skip
    told = ("r", None, "Be brief.", "Picture 1: <img>a.jpg</img>\nHi.", "Hello.", "Sum up.\nA text.", "It.")
    assert read(tmp_path / "d.json", [alpaca], tmp_path) == ([told], [])
    developer = said("What?", "A flag.")
    developer["messages"].insert(0, {"role": "developer", "content": "Be brief."})
    assert read(tmp_path / "d.json", [developer], tmp_path)[0] == [("r", None, "Be brief.", "What?", "A flag.")]


BROKEN = {
    "unsupported key": [
        said("What?", "A flag.", **keys)
        for keys in ({"audios": ["a.wav"]}, {"tools": "[{}]"}, {"chosen": "x"}, {"weight": 0.5},
                     {"rejected_response": "x"}, {"loss": False}, {"train": 0}, {"objects": {"ref": ["a"]}},
                     {"kto_tag": False}, {"label": False})
    ],
    "unsupported role": [{"id": "r", "messages": [{"role": "tool", "content": "x"}]}],
    "unsupported part": [said([{"type": "audio", "audio": "a.wav"}, TEXT], "A flag.")],
    "pictures do not match": [
        said("<image>What?", "A flag."),
        said("<image>What?", "A flag.", images=["a.jpg", "b.jpg"]),
        said([{"type": "image", "index": 1}, TEXT], "A flag.", images=["a.jpg"]),
        said("What?", "<image>A flag.", images=["a.jpg"]),
    ],
    "bad record": [
        said("What?", None),
        said("What?", "A flag.", conversations=[{"role": "user", "content": "x"}]),
        said([{"type": "image", "base64": "!"}, TEXT], "A flag."),
        {"id": "r", "instruction": "What?", "output": None},
        {"id": "r", "query": "What?", "response": "A.", "history": [["x"]]},
    ],
    "bad weight": [
        {"id": "r", "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!", "loss": one}]}
        for one in (-1, 101, float("nan"), float("inf"), 10**400, "1")
    ],
    "markup in text": [said("<img>b.jpg</img>What?", "A flag.")],
}  # fmt: skip


@pytest.mark.parametrize("cause", BROKEN)
def test_what_cannot_be_trained_is_rejected_by_name(cause: str, tmp_path: Path) -> None:
    for record in BROKEN[cause]:
        assert read(tmp_path / "d.json", [record], tmp_path) == ([], [("r", cause)]), record


def test_inline_pictures_absolute_paths_and_utf_16_reach_the_shards(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p/a.png").write_bytes(PNG)
    records = [
        said([{"type": "image_url", "image_url": {"url": URL}}, TEXT], "1"),
        said("What?", "2", images=[{"bytes": base64.b64encode(PNG).decode(), "path": None}]),
        said("What?", "3", images=[str(tmp_path / "p/a.png")]),
        said([{"type": "image", "url": (tmp_path / "p/a.png").as_uri()}, TEXT], "4"),
        said("What?", "5", images=["/etc/hostname"]),
        said("What?", "6"),
        said("What?", "7", images=["data:image/png;base64,?"]),
    ]
    records[5]["messages"][1]["weight"] = 0
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, records)), encoding=encoding)
        out = tmp_path / encoding
        prepare(tmp_path, [], name=encoding, images=tmp_path / "p", json=tmp_path / "d.jsonl")
        rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
        assert [one["cause"] for one in rejected] == ["unsafe image path", "nothing to train on", "bad record"]
        assert max(len(one["reason"]) for one in rejected) < 200
        assert (out / "shard-000000.tar").read_bytes().count(PNG) == 4


def test_inline_pictures_in_other_forms(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    turns = [{"from": "user", "value": f"Picture 1: <img>{URL}</img>\nWhat?"}, {"from": "assistant", "value": "1"}]
    asked = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "1"}]
    for form, record in (("qwen-vl", {"conversations": turns}), ("llava", {"conversations": asked, "image": URL}),
                         ("llava", {"conversations": asked, "image": str(tmp_path / "a.png")})):  # fmt: skip
        out = prepare(tmp_path, [record], name="one", images=tmp_path, format=form, overwrite=True)
        shard = (out / "shard-000000.tar").read_bytes()
        assert shard.count(PNG) == 1 and b"base64" not in shard


def test_weights_come_to_the_packs(tmp_path: Path, tokenizer: Tokenizer) -> None:
    record = said("One?", "first", "Two?", "second", "Three?", "third")
    record["messages"][1] |= {"loss": False}
    record["messages"][3] |= {"weight": 0.5}
    out = prepare(tmp_path, [record], name="weighted", images=tmp_path)
    reader = open_reader([out], tokenizer, training=False, sequence_length=96)
    (pack,) = list(reader)
    reader.close()
    assert pack.loss_weights is not None
    # A position's label is the token behind it.
    shown = {weight: tokenizer.decode(pack.labels[(pack.loss_weights == weight) & (pack.labels >= 0)].tolist())
             for weight in (0.5, 1.0)}  # fmt: skip
    assert "second" in shown[0.5] and "third" in shown[1.0] and "first" not in shown[0.5] + shown[1.0]
    assert pack.supervised_tokens == int((pack.labels >= 0).sum())
    lighter = prepare(tmp_path, [said("One?", "first")], name="plain", images=tmp_path)
    (pack,) = list(open_reader([lighter], tokenizer, training=False, sequence_length=96))
    assert pack.loss_weights is None


def test_parquet_with_pictures_in_the_parts(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    part = {"type": "image", "text": None, "image": {"bytes": PNG, "path": None}}
    deep = said([part, {"type": "text", "text": "What?", "image": None}], [{"type": "text", "text": "A flag."}])
    beside = said([{"type": "image", "index": 0}, TEXT], [TEXT], images=[{"bytes": PNG, "path": "x.png"}])
    for name, record in (("deep", deep), ("beside", beside)):
        parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / f"{name}.parquet")
        source = Source(tmp_path / f"{name}.parquet", tmp_path)
        (found,) = choose(source, None).load().read(source)
        path = found["conversations"][0]["value"].partition("<img>")[2].partition("</img>")[0]
        assert source.read_image(path) == PNG


def test_what_dataset_info_calls_things(tmp_path: Path) -> None:
    entry = {"file_name": "d.json", "formatting": "sharegpt",
             "columns": {"messages": "talk", "images": "pics", "system": "sys"},
             "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "Q", "assistant_tag": "A"}}  # fmt: skip
    talk = [{"who": "Q", "says": "<image>What?"}, {"who": "A", "says": "A flag.", "weight": 0.5}]
    record = {"id": "r", "talk": talk, "pics": ["a.jpg"], "sys": "Be brief."}
    info = tmp_path / "dataset_info.json"
    info.write_text(json.dumps({"mine": entry, "hub": {"hf_hub_url": "x"}}))
    assert read(tmp_path / "d.json", [record], tmp_path) == ([("r", None, "Be brief.", SHOWN, "A flag.")], [])
    info.write_text(json.dumps({"mine": {"file_name": "d.json", "columns": {"prompt": "q", "response": "a"}}}))
    plain = {"id": "r", "q": "What?", "a": "A flag."}
    assert read(tmp_path / "d.json", [plain], tmp_path) == ([("r", None, "What?", "A flag.")], [])
    # What has a name by itself that another column gets is not meant.
    both = plain | {"instruction": "Quoi?", "output": "Un drapeau."}
    assert read(tmp_path / "d.json", [both], tmp_path) == ([("r", None, "What?", "A flag.")], [])
    for more, message in (({"ranking": True}, "set of preferences"), ({"formatting": "x"}, "formatting 'x'"),
                          ({"tags": {"colour": "x"}}, "'colour'")):  # fmt: skip
        info.write_text(json.dumps({"mine": entry | more}))
        with pytest.raises(UserError, match=message):
            read(tmp_path / "d.json", [record], tmp_path)
    info.write_text(json.dumps({"mine": entry, "other": entry | {"tags": {}}}))
    with pytest.raises(UserError, match="mine and other say different things"):
        read(tmp_path / "d.json", [record], tmp_path)
