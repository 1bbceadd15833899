"""Benchmarks in Hugging Face's parquet files: what is read, and what it costs when a file is wrong."""

from __future__ import annotations

import base64
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from benchmark_files import COUNT, encoded
from parquet_files import QUESTIONS, ROWS, make, mmmu, write

from megavlm import cli
from megavlm.evaluation.benchmarks import BENCHMARKS, hub, read_items
from megavlm.evaluation.benchmarks.parquet import read_rows
from megavlm.evaluation.benchmarks.spec import BenchmarkFiles, Item, picture_bytes, render


def read(name: str, path: Path, **more: Any) -> list[Item]:
    items = read_items(BENCHMARKS[name], BenchmarkFiles(path, path.parent, **more))
    for item in items:
        render(BENCHMARKS[name], item)
    return items


@pytest.mark.parametrize("name", list(hub.ROWS))
def test_every_row_becomes_a_question(name: str, tmp_path: Path) -> None:
    items = read(name, make(name, tmp_path / "test.parquet"))
    assert len(items) == QUESTIONS.get(name, COUNT)
    assert all(item.answers for item in items)
    shown = [picture_bytes(picture) for item in items for picture in item.pictures]
    assert all(data[:2] == b"\xff\xd8" for data in shown)  # JPEG, whole
    assert len(set(shown)) >= 3


def test_all_have_rows() -> None:
    assert set(ROWS) == set(hub.ROWS)


def test_mmmu_as_published_equals_its_json(tmp_path: Path) -> None:
    """The same rows as parquet, and as JSON lines with the pictures in base64."""
    rows = [mmmu(i) for i in range(7)]
    lines = [
        {key: {"bytes": base64.b64encode(value["bytes"]).decode()} if isinstance(value, dict) else value
         for key, value in row.items()} for row in rows
    ]  # fmt: skip
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stored = read("mmmu", write(tmp_path / "validation-00000-of-00001.parquet", rows))
    plain = read("mmmu", tmp_path / "validation.jsonl")
    for one, other in zip(stored, plain, strict=True):
        shown = tuple(picture_bytes(picture) for picture in one.pictures)
        assert replace(one, pictures=shown) == other
    assert [len(item.pictures) for item in stored[:2]] == [1, 3]  # the second names image 1 twice
    assert picture_bytes(stored[1].pictures[1]) == base64.b64decode(encoded(12))


def test_shards_and_splits(tmp_path: Path) -> None:
    write(tmp_path / "validation-00001-of-00002.parquet", [mmmu(3)])
    write(tmp_path / "validation-00000-of-00002.parquet", [mmmu(i) for i in range(3)])
    assert [item.id[-1] for item in read("mmmu", tmp_path)] == ["0", "1", "2", "3"]
    write(tmp_path / "dev-00000-of-00001.parquet", [mmmu(5)])
    with pytest.raises(ValueError, match="has the splits dev, validation; say which with --split NAME"):
        read("mmmu", tmp_path)
    assert [item.id[-1] for item in read("mmmu", tmp_path, split="dev")] == ["5"]
    with pytest.raises(ValueError, match=r"--split test: .* has dev, validation"):
        read("mmmu", tmp_path, split="test")
    for i, subject in enumerate(("Accounting", "Art")):  # as MMMU/MMMU has them
        for split in ("dev", "validation"):
            write(tmp_path / "hub" / subject / f"{split}-00000-of-00001.parquet", [mmmu(2 * i), mmmu(2 * i + 1)])
    items = read("mmmu", tmp_path / "hub", split="validation")
    assert [item.id[-1] for item in items] == ["0", "1", "2", "3"]
    assert len({picture.name for item in items for picture in item.pictures}) == 6
    write(tmp_path / "hub" / "Art" / "validation-00000-of-00001.parquet", [mmmu(4), mmmu(1) | {"image_2": None}])
    with pytest.raises(ValueError, match=r"hub: in Art/validation-00000-of-00001\.parquet row 1: names <image 2>"):
        read("mmmu", tmp_path / "hub", split="validation")


def test_wrong_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make("pope", tmp_path / "pope.parquet")
    with pytest.raises(ValueError, match=r"pope\.parquet: in row 0: has no text 'questionId'"):
        read("docvqa", path)
    with pytest.raises(ValueError, match="refcoco reads refcoco_testA"):
        read("refcoco", path)
    row = mmmu(1) | {"image_2": None}
    with pytest.raises(ValueError, match="row 0: names <image 2>, but has no image_2"):
        read("mmmu", write(tmp_path / "a.parquet", [row, mmmu(3)]))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"pope\.parquet cannot be read as parquet from row 0 on: "):
        read("pope", path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"needs pyarrow; pip install 'megavlm\[parquet\]'"):
        read("pope", path)


def test_pictures_are_read_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a benchmark's pictures may not fit into memory: the columns are read without them."""
    path = make("vqav2", tmp_path / "vqav2.parquet")
    taken: list[str] = []
    real = pyarrow.parquet.ParquetFile.read_row_group

    def spy(self: Any, group: int, columns: list[str]) -> Any:
        taken.extend(columns)
        return real(self, group, columns=columns)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", spy)
    rows = read_rows(BenchmarkFiles(path, tmp_path))
    assert "image.path" in taken
    assert not {"image", "image.bytes"}.intersection(taken)
    assert picture_bytes(rows[4][1]["image"]) == base64.b64decode(encoded(4))
    assert taken[-1] == "image"


def test_a_broken_picture_is_counted(random_checkpoint: Path, tmp_path: Path) -> None:
    rows = [mmmu(i) for i in range(5)]
    rows[3]["image_2"]["bytes"] = rows[3]["image_2"]["bytes"][:200]
    data = write(tmp_path / "validation-00000-of-00001.parquet", rows)
    words = ["eval", str(random_checkpoint), "--benchmark=mmmu", f"--data={data}", f"--out={tmp_path / 'out'}"]
    assert cli.main([*words, "--max-new-tokens=3"]) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["questions_answered"] == 4
    wrong = scores["questions_counted_wrong"]
    assert list(wrong) == ["validation_Art_3"]
    assert "validation-00000-of-00001.parquet:1:0:image_2: " in wrong["validation_Art_3"]
    assert (tmp_path / "out" / "report.html").read_text().count("<img alt=") == 4


def test_a_damaged_part_of_a_file_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make("pope", tmp_path / "pope.parquet")
    with pyarrow.parquet.ParquetFile(path) as file:
        group = file.metadata.row_group(1)
        columns = [group.column(index) for index in range(group.num_columns)]
        place = next(one for one in columns if one.path_in_schema == "image.bytes")
        start, size = place.dictionary_page_offset or place.data_page_offset, place.total_compressed_size
    data = bytearray(path.read_bytes())
    data[start : start + size] = b"\xff" * size
    path.write_bytes(data)
    shown = [picture_bytes(item.pictures[0]) for item in read("pope", path)]
    assert [bool(one) for one in shown] == [True, True, True, False, False]
    assert "pope.parquet cannot be read as parquet from row" in caplog.text
