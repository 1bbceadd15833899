"""Parquet with pictures in it: CodeFuse-VLM's, SynthDoG's and LLaVA's on the hub."""

import json
import logging
import sys
import tarfile
from pathlib import Path

import pytest
from data_helpers import encode_image
from PIL import Image

from megavlm import cli
from megavlm.config.load import load_recipe
from megavlm.families.presets import expand_presets

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
PICTURES = [encode_image(Image.new("RGB", (30 + i, 20), (i * 9, 50, 90))) for i in range(24)]


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        picture = any(isinstance(value, dict) and "bytes" in value for value in values)
        columns[name] = pyarrow.array(values, IMAGE) if picture else pyarrow.array(values)
    parquet.write_table(pyarrow.table(columns), path, row_group_size=7)
    return path


def image(number: int) -> dict:
    return {"bytes": PICTURES[number], "path": None}


def prepare(source: Path, out: Path, *words: object) -> list[tuple[dict, list[bytes]]]:
    """The records of the shards, each with its pictures."""
    assert cli.main(["prepare", str(source), "--out", str(out), *map(str, words)]) == 0
    found: dict[str, tuple[dict, list[bytes]]] = {}
    with tarfile.open(out / "shard-000000.tar") as tar:
        for member in tar:
            key, kind = member.name.split(".")
            data = tar.extractfile(member).read()
            if kind == "json":
                found[key] = (json.loads(data), [])
            else:
                found[key][1].append(data)
    return list(found.values())


def texts(record: dict) -> list[str]:
    return [turn["value"] for turn in record["conversations"]]


def test_codefuse_prompts_and_ground_truths(tmp_path: Path) -> None:
    one = [{"image": image(i), "prompt": f"<image>\nRead {i}.\n", "ground_truth": f"text {i}"} for i in range(20)]
    write(tmp_path / "ocr" / "part-0.parquet", one[:12])
    write(tmp_path / "ocr" / "part-1.parquet", one[12:])
    found = prepare(tmp_path / "ocr", tmp_path / "out")
    assert [pictures for _, pictures in found] == [[data] for data in PICTURES[:20]]
    assert [record["task"] for record, _ in found] == ["ocr"] * 20
    name = "part-1.parquet/0/0"
    assert texts(found[12][0]) == [f"Picture 1: <img>{name}</img>\nRead 12.", "text 12"]
    # Several rounds; without <image>, the picture comes first.
    rounds = [
        {"image": image(3), "prompts": ["What?", "And?"], "ground_truths": ["This.", "That."]},
        {"image": image(4), "prompts": ["What?", "And <image>?"], "ground_truths": ["This.", "That."]},
        {"image": image(5), "prompts": ["What?"], "ground_truths": ["This.", "That."]},
        {"image": {"bytes": b"?", "path": None}, "prompts": ["What?"], "ground_truths": ["This."]},
    ]
    found = prepare(write(tmp_path / "sft.parquet", rounds), tmp_path / "sft")
    assert [record["task"] for record, _ in found] == ["sft"] * 2
    assert texts(found[0][0]) == ["Picture 1: <img>sft.parquet/0/0</img>\nWhat?", "This.", "And?", "That."]
    assert texts(found[1][0])[2] == "And\nPicture 1: <img>sft.parquet/1/0</img>\n?"
    rejected = [json.loads(line) for line in (tmp_path / "sft" / "rejected.jsonl").read_text().splitlines()]
    assert [(r["id"], r["cause"]) for r in rejected] == [
        ("sft.parquet/2", "no answer"),
        ("sft.parquet/3", "bad image (not an image)"),
    ]


def test_a_folder_of_tasks_may_hold_json_and_parquet(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    tasks = tmp_path / "tasks"
    write(tasks / "ocr" / "part.parquet", [{"image": image(1), "prompt": "<image>Read.", "ground_truth": "a"}])
    (tasks / "vqa.json").write_text(json.dumps([{"id": 1, "image": "v.jpg", "conversations": turns}]))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "v.jpg").write_bytes(PICTURES[2])
    found = prepare(tasks, tmp_path / "out", "--images", tmp_path / "images")
    assert [(record["task"], pictures) for record, pictures in found] == [
        ("ocr", [PICTURES[1]]),
        ("vqa", [PICTURES[2]]),
    ]


def test_tasks_become_data_sets_of_their_own_that_a_recipe_takes(tmp_path: Path) -> None:
    tasks, out = tmp_path / "tasks", tmp_path / "out"
    pages = [{"image": image(i), "prompt": "<image>Read.", "ground_truth": "a"} for i in range(5)]
    write(tasks / "ocr & co" / "part.parquet", pages)
    write(tasks / "ocr + co" / "part.parquet", pages[:2])
    text = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Ho."}]
    (tasks / "chat.jsonl").write_text(json.dumps({"id": 1, "conversations": text}) + "\n{")
    assert cli.main(["prepare", str(tasks), "--out", str(out), "--by-task"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "chat",
        "data.yaml",
        "ocr-co",
        "ocr-co-2",
        "rejected.jsonl",
    ]
    recipe = load_recipe("quickstart", (), expand_presets, [out / "data.yaml"])
    assert [(source.task, source.name, source.weight) for source in recipe.data.train] == [
        ("chat", "chat", 1),
        ("ocr & co", "ocr-co", 5),
        ("ocr + co", "ocr-co-2", 2),
    ]
    for source in recipe.data.train:
        info = json.loads((Path(source.path) / ".nv-meta" / ".info.json").read_text())
        assert sum(info["shard_counts"].values()) == source.weight


def test_synthdog_and_llava_as_the_hub_has_them(tmp_path: Path) -> None:
    truth = json.dumps({"gt_parse": {"text_sequence": "Some text."}})
    pages = [{"image": image(i), "ground_truth": truth} for i in range(9)]
    found = prepare(write(tmp_path / "hub" / "train-00000.parquet", pages).parent, tmp_path / "pages")
    assert [pictures for _, pictures in found] == [[data] for data in PICTURES[:9]]
    assert found[8][0]["task"] == "ocr"
    assert texts(found[8][0]) == ["<img>train-00000.parquet/8/0</img>OCR:", "Some text."]
    answer = {"from": "gpt", "value": "Ho."}
    rows = [
        {"id": "a", "image": image(1), "conversations": [{"from": "human", "value": "<image>\nHi."}, answer]},
        {"id": "b", "image": None, "conversations": [{"from": "human", "value": "Hi."}, answer]},
    ]
    found = prepare(write(tmp_path / "next.parquet", rows), tmp_path / "next")
    assert [(record["id"], pictures) for record, pictures in found] == [("a", [PICTURES[1]]), ("b", [])]


def test_wrong_parquet_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = write(tmp_path / "good.parquet", [{"image": image(1), "prompt": "Read.", "ground_truth": "a"}])
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(good.read_bytes()[:-9])
    words = ["--out", str(tmp_path / "out")]
    assert cli.main(["prepare", str(cut), *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"megavlm: error: {cut} cannot be read as parquet from row 0 on: ")
    assert err.endswith("; fetch it again\n")
    assert len(err.splitlines()) == 1
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert cli.main(["prepare", str(good), *words]) == 2
    assert capsys.readouterr().err == f"megavlm: error: {good}: parquet needs pyarrow; pip install 'megavlm[parquet]'\n"
    assert not (tmp_path / "out").exists()


def test_a_limit_of_what_may_be_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"image": image(1), "prompt": "Read.", "ground_truth": "a"}] * 3
    broken = [{"image": {"bytes": b"?", "path": None}, "prompt": "Read.", "ground_truth": "a"}]
    source = write(tmp_path / "x.parquet", rows + broken)
    words = ["prepare", str(source), "--out", str(tmp_path / "out"), "--max-rejected"]
    assert cli.main([*words, "0.2"]) == 2
    why = "25.0% of the records are rejected (1 bad image (not an image)), more than --max-rejected 0.2; nothing"
    assert why in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    caplog.set_level(logging.INFO)
    assert cli.main([*words, "0.25"]) == 0
    assert "3 samples with 3 images in 1 shards; 1 rejected" in caplog.text
    assert cli.main([*words, "2"]) == 2
    assert "--max-rejected must be a share from 0 to 1, not 2" in capsys.readouterr().err
