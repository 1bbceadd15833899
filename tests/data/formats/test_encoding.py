"""A text file has one encoding, from its first line to its last."""

from __future__ import annotations

import codecs
import json
import os
import threading
from pathlib import Path

import pytest

from megavlm.data.formats import Broken, Source, choose
from megavlm.data.formats.encoding import lines
from megavlm.evaluation.benchmarks.files import read_json, read_lines, read_table

TEXTS = ["first", "Zażółć gęślą jaźń.", "Это флаг, да.", "这是 flag。\u2028\U0001f600", "naïve é"]
"""Read as UTF-8 or as the wrong half of UTF-16, some of these are text of another kind, and no error."""
ENCODINGS = [
    ("utf-8", b""),
    ("utf-8", codecs.BOM_UTF8),
    ("utf-16-le", codecs.BOM_UTF16_LE),
    ("utf-16-be", codecs.BOM_UTF16_BE),
    ("utf-16-le", b""),
    ("utf-16-be", b""),
    ("utf-32-le", codecs.BOM_UTF32_LE),
    ("utf-32-be", codecs.BOM_UTF32_BE),
    ("utf-32-le", b""),
    ("utf-32-be", b""),
]


def record(text: str) -> dict:
    return {"conversations": [{"from": "user", "value": "What?"}, {"from": "assistant", "value": text}]}


def answers(path: Path) -> list[str]:
    source = Source(path, path.parent)
    entries = list(choose(source, None).load().read(source))
    return [e.cause if isinstance(e, Broken) else e["conversations"][1]["value"] for e in entries]


@pytest.mark.parametrize(("encoding", "mark"), ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_all_of_unicode_is_read(encoding: str, mark: bytes, end: str, tmp_path: Path) -> None:
    records = [record(text) for text in TEXTS]
    lines = end.join(json.dumps(one, ensure_ascii=False) for one in records) + end
    for name, text in {
        "d.jsonl": lines,
        "d.json": json.dumps(records, ensure_ascii=False, indent=1).replace("\n", end),
    }.items():
        path = tmp_path / name
        path.write_bytes(mark + text.encode(encoding))
        assert answers(path) == TEXTS, name
    assert [row["conversations"][1]["value"] for _, row in read_lines(tmp_path / "d.jsonl")] == TEXTS
    assert read_json(tmp_path / "d.json", list) == records
    if mark or encoding == "utf-8":
        table = tmp_path / "t.tsv"
        table.write_bytes(mark + f"index\tquestion{end}1\tnaïve 这是{end}".encode(encoding))
        assert read_table(table) == [{"index": "1", "question": "naïve 这是"}]


@pytest.mark.parametrize("encoding", ["latin-1", "gb18030", "cp1250"])
def test_lines_of_other_encodings_are_refused_and_never_guessed(encoding: str, tmp_path: Path) -> None:
    word = {"latin-1": "naïve é", "gb18030": "这是", "cp1250": "żółć"}[encoding]
    lines = [json.dumps(record(text), ensure_ascii=False) for text in ("first", word, "last")]
    path = tmp_path / "d.jsonl"
    path.write_bytes("\n".join(lines).encode(encoding))
    assert answers(path) == ["first", "not UTF-8", "last"]
    (broken,) = (e for e in Source(path, tmp_path).rows() if isinstance(e, Broken))
    assert "line 2 is not UTF-8 text" in broken.reason and "iconv" in broken.reason
    with pytest.raises(ValueError, match="line 2 is not UTF-8 text"):
        read_lines(path)
    path = tmp_path / "d.json"
    path.write_bytes(f"[{','.join(lines)}]".encode(encoding))
    with pytest.raises(ValueError, match=r"d\.json is not UTF-8 text; convert it, for instance with iconv"):
        answers(path)


def test_damaged_utf_16_ends_with_a_line_for_the_user(tmp_path: Path) -> None:
    text = "\n".join(json.dumps(record(text), ensure_ascii=False) for text in TEXTS)
    data = codecs.BOM_UTF16_LE + text.encode("utf-16-le")
    for name, bad in {"cut": data[:-1], "half a pair": data + b"\x00\xd8\n\x00"}.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="is not UTF-16 text; convert it"):
            answers(path)


def test_marks_inside_and_odd_starts(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    line = json.dumps(record("é"), ensure_ascii=False).encode()
    path.write_bytes(line + b"\n\n" + codecs.BOM_UTF8 + line)  # two files put together
    assert answers(path) == ["é", "é"]
    path.write_bytes(bytes(8) + b"\n" + line)  # what a crash leaves at the start of a file
    assert answers(path) == ["bad JSON", "é"]


def test_a_pipe_is_read_once_and_whole(tmp_path: Path) -> None:
    pipe = tmp_path / "records.jsonl"
    os.mkfifo(pipe)
    texts = [json.dumps({"id": number}) + "\n" for number in range(3)]
    writer = threading.Thread(target=lambda: pipe.write_text("".join(texts)))
    writer.start()
    assert [json.loads(str(line)) for _, line in lines(pipe)] == [{"id": number} for number in range(3)]
    writer.join()
