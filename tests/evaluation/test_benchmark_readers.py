"""Readers on damaged files: whatever a file holds, wrong input is an error in words, never a crash."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import COUNT, MAKERS, QUESTIONS

from megavlm.config.errors import UserError
from megavlm.evaluation.benchmarks import BENCHMARKS
from megavlm.evaluation.benchmarks.spec import LETTERS, BenchmarkFiles, Item, render

WRONG = (None, 5, "x", [5], {"a": 1}, "half a character \ud83d", ["\udfff"])


def source_of(words: list[str]) -> BenchmarkFiles:
    given = dict(word.removeprefix("--").split("=", 1) for word in words)
    data = Path(given["data"])
    return BenchmarkFiles(data, Path(given.get("images", data if data.is_dir() else data.parent)))


def places(value: Any, depth: int = 5) -> Iterator[list[Any]]:
    """Paths to every part of a JSON value; of a list only to the first two."""
    yield []
    keys = (
        list(value) if isinstance(value, dict) else list(range(min(2, len(value)))) if isinstance(value, list) else []
    )
    for key in keys if depth else []:
        for rest in places(value[key], depth - 1):
            yield [key, *rest]


def damaged(value: Any) -> Iterator[Any]:
    """Copies of a JSON value with one part replaced, or taken out."""
    for path in places(value):
        if not path:
            yield from WRONG
            continue
        for wrong in (*WRONG, "delete"):
            one = copy.deepcopy(value)
            holder = one
            for key in path[:-1]:
                holder = holder[key]
            if wrong == "delete":
                del holder[path[-1]]
            else:
                holder[path[-1]] = wrong
            yield one


def read(name: str, source: BenchmarkFiles) -> list[Item]:
    items = BENCHMARKS[name].read(source)
    for item in items:
        render(BENCHMARKS[name], item)
        assert all(isinstance(answer, str) for answer in item.answers)
        texts = (item.id, item.question, item.hint, item.kind, item.unit, *item.answers, *item.choices)
        "".join(texts).encode()  # what no tokenizer takes and no report can hold does not get here
        assert not item.choices or not item.answers or item.answers[0] in LETTERS[: len(item.choices)]
    return items


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name not in ("mme", "mmbench", "mmbench-cn", "ai2d")])
def test_damaged_json(name: str, tmp_path: Path) -> None:
    source = source_of(MAKERS[name](tmp_path))
    assert len(read(name, source)) == QUESTIONS.get(name, COUNT)
    text = source.data.read_text("utf-8")
    lines = name in ("pope", "mmmu") or name.startswith("refcoco")
    value = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    refused = 0
    for one in damaged(value):
        if lines and not isinstance(one, list):
            continue
        new = "".join(json.dumps(row) + "\n" for row in one) if lines else json.dumps(one)
        source.data.write_text(new, "utf-8")
        try:
            read(name, source)
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            assert "\n" not in str(error)
            assert str(error).startswith((str(source.data), "question", "no answers"))
    assert refused > 10
    source.data.write_text(text[: len(text) // 2], "utf-8")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read(name, source)


@pytest.mark.parametrize("name", ["vqav2", "ai2d"])
def test_damaged_second_file(name: str, tmp_path: Path) -> None:
    source = source_of(MAKERS[name](tmp_path))
    path = tmp_path / ("v2_mscoco_val2014_annotations.json" if name == "vqav2" else "questions/1.png.json")
    value = json.loads(path.read_text())
    refused = 0
    for one in damaged(value):
        path.write_text(json.dumps(one), "utf-8")
        try:
            read(name, source)
        except (ValueError, FileNotFoundError):
            refused += 1
    assert refused > 10


def caught(table: BenchmarkFiles, text: str) -> ValueError:
    table.data.write_text(text)
    with pytest.raises(ValueError) as error:
        read("mmbench", table)
    return error.value


def test_damaged_tables_and_folders(tmp_path: Path) -> None:
    table = source_of(MAKERS["mmbench"](tmp_path / "a"))
    text = table.data.read_text()
    for old, new in (
        ("index", "nummer"),
        ("240", "x"),
        ("\tA\t", "\tQ\t"),
        ("\timage", "\tpicture"),
        ("question", "q"),
    ):
        table.data.write_text(text.replace(old, new, 1))
        with pytest.raises(ValueError, match=r"^.*tsv: row "):
            read("mmbench", table)
    assert "without a gap, not B" in str(caught(table, text.replace("\tA\t", "\tQ\t", 1)))
    table.data.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not a tab-separated table"):
        read("mmbench", table)
    folder = source_of(MAKERS["mme"](tmp_path / "b"))
    for text in ("no tab here\n", "Is it?\tmaybe\n"):
        (tmp_path / "b" / "code_reasoning" / "000.txt").write_text(text)
        with pytest.raises(ValueError, match="line 1 is not a question, a tab, and Yes or No"):
            read("mme", folder)
    with pytest.raises(FileNotFoundError, match="MME's folder"):
        read("mme", BenchmarkFiles(tmp_path / "none", tmp_path))


def test_no_picture_lies_outside_the_directory(tmp_path: Path) -> None:
    source = source_of(MAKERS["pope"](tmp_path))
    for name in ("../../etc/passwd", "/etc/passwd", "a\0b", ""):
        row = {"question_id": 1, "image": name, "text": "?", "label": "yes"}
        source.data.write_text(json.dumps(row) + "\n")
        with pytest.raises(ValueError, match="must be a path inside the image directory"):
            read("pope", source)


def test_splits(tmp_path: Path) -> None:
    for name, split, count in (("ocrvqa", "train", 2), ("ai2d", "all", COUNT), ("scienceqa", "train", 1)):
        plain = source_of(MAKERS[name](tmp_path / name))
        assert len(read(name, BenchmarkFiles(plain.data, plain.images, split=split))) == count
        with pytest.raises(ValueError, match=r"--split|no question"):
            read(name, BenchmarkFiles(plain.data, plain.images, split="nonsense"))


def test_what_readers_make_of_files(tmp_path: Path) -> None:
    """Prompts and references of one question each, as the formats mean them."""

    def first(name: str, index: int = 0) -> tuple[str, Item]:
        item = read(name, source_of(MAKERS[name](tmp_path / name)))[index]
        return render(BENCHMARKS[name], item), item

    text, item = first("vqav2")
    assert (text, item.answers) == ("<img></img>What colour is circle 0? Answer:", ("red",) * 3 + ("blue",) * 7)
    text, item = first("scienceqa", 1)
    assert text == "<img></img>Context: N/A\nQuestion: Which is north?\nOptions: A. red\nB. blue\nAnswer:"
    text, item = first("seed")
    assert text == "<img></img>\nQuestion: How many?\nOptions: A. One\nB. Two\nC. Three\nD. Four\nAnswer:"
    assert (item.answers, item.kind) == (("A",), "Scene Understanding")
    text, item = first("mme")
    assert text == "<img></img>\nIs it red? Please answer yes or no."
    assert item.pictures == (tmp_path / "mme" / "artwork" / "images" / "toy_dataset" / "0.jpg",)
    (tmp_path / "mme").rename(tmp_path / "MME_Benchmark")  # as the hub's copy has it, a folder deeper
    assert len(read("mme", BenchmarkFiles(tmp_path, tmp_path))) == QUESTIONS["mme"]
    text, item = first("refcoco")
    assert (text, item.box, item.size) == ("<img></img><ref>left square</ref><box>", (2.0, 3.5, 20.0, 30.0), (40, 32))
    text, item = first("nocaps")
    assert (text, len(item.answers)) == ("<img></img>Describe the image in English:", 3)
    text, item = first("mmmu", 1)
    assert text == "<img></img> How much is 1?\nOptions: A. <img></img>\nB. $8\nC. $10\nAnswer:"
    assert (len(item.pictures), item.kind) == (2, "Accounting")
    text, item = first("mmmu", 2)
    assert (text, item.answers) == ("<img></img> How much is 2? Answer:", ("8", "8.0"))
    _, item = first("ai2d")
    assert (item.id, item.answers, str(item.pictures[0])[-12:]) == ("1.png-0", ("face",), "images/1.png")


@pytest.mark.parametrize("side", ["NaN", "Infinity", "1e300", "true", '"3"'])
def test_a_box_is_of_a_picture(side: str, tmp_path: Path) -> None:
    """JSON as Python reads it has numbers that are none: they would end the command once all is answered."""
    source = source_of(MAKERS["refcoco"](tmp_path))
    lines = source.data.read_text("utf-8").splitlines()
    lines[1] = re.sub(r'"bbox": \[[^,]*', f'"bbox": [{side}', lines[1])
    source.data.write_text("\n".join(lines), "utf-8")
    with pytest.raises(UserError, match="line 2: has no box of four numbers 'bbox'"):
        read("refcoco", source)
