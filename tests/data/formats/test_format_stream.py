"""A JSON file read piece by piece gives what it holds, wherever the pieces end, and says where it is broken."""

import json
import random
import tracemalloc
from pathlib import Path

import pytest

from megavlm.data.formats import stream

VALUES = [
    0,
    -12,
    3.25e-7,
    123456789,
    True,
    None,
    "",
    'a"\\\n\u00e9\U0001f600',
    [],
    {},
    [[1, [2]], {"k": []}],
    {"a": [{"b": "x" * 40}]},
]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(params=[1, 2, 7, 1 << 20])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(stream, "_PIECE", request.param)
    return request.param


def test_lists_and_objects_wherever_the_pieces_end(tmp_path: Path, piece: int) -> None:
    rng = random.Random(piece)
    for trial in range(20):
        values = rng.choices(VALUES, k=rng.randrange(6))
        indent = rng.choice([None, 0, 30])  # 30: more space than the tail of a piece that may hide a cut
        path = write(
            tmp_path / f"{trial}.json",
            rng.choice(["", "\ufeff", "\n \t"]) + json.dumps(values, indent=indent, ensure_ascii=trial % 2 == 0),
        )
        assert stream.kind(path) == "["
        assert list(stream.elements(path)) == values
        named = {f"n{i}": value for i, value in enumerate(values)} | {"rows": values, "last": 7}
        path.write_text(json.dumps(named, indent=indent))
        assert stream.kind(path) == "{"
        assert dict(stream.members(path)) == named
        assert list(stream.elements(path, "rows")) == values
        assert list(stream.elements(path, "none")) == []
        assert stream.outline(path, most=100) == named
    path.write_text(json.dumps({"long": list(range(50)), "b": 2, "c": 3}))
    assert stream.outline(path, most=2) == {"long": [0, 1], "b": 2}


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('[{"a": 1},\n{"a": 2},\n{"a" 3}]', "record 2, line 3: Expecting ':' delimiter"),
        ("[1,\n2", "record 1, line 2: , or ] is missing"),
        ("[1 2]", "record 0, line 1: , or ] is missing"),
        ('["a\nb"]', "record 0, line 1: Invalid control character"),
        ('["never closed, 1]', "record 0, line 1: Unterminated string"),
        ("[tru]", "record 0, line 1: Expecting value"),
        ("[1,]", "record 1, line 1: Expecting value"),
        (f"[{'9' * 5000}]", "record 0, line 1: Exceeds the limit"),
        (f"[{'[' * 100_000}", "record 0, line 1: "),
    ],
)
def test_a_broken_file_says_where(tmp_path: Path, piece: int, text: str, where: str) -> None:
    path = write(tmp_path / "x.json", text)
    with pytest.raises(ValueError, match="is not valid JSON") as error:
        list(stream.elements(path))
    assert str(error.value).startswith(f"{path} is not valid JSON: {where}")
    assert "write the records as .jsonl" in str(error.value)


def test_what_is_no_json_at_all(tmp_path: Path, piece: int) -> None:
    for text in ("", "  \n", "plain", '"text"', "7"):
        with pytest.raises(ValueError, match=r"must begin with \[ or \{"):
            stream.kind(write(tmp_path / "x.json", text))
    with pytest.raises(ValueError, match=r"something follows after its end, on line 2; .* must be called \.jsonl"):
        dict(stream.members(write(tmp_path / "x.json", '{"a": 1}\n{"a": 2}\n')))
    (tmp_path / "y.json").write_bytes(b'["\xff"]')
    with pytest.raises(ValueError, match="is not UTF-8 text; convert it"):
        list(stream.elements(tmp_path / "y.json"))


def test_memory_is_that_of_a_record(tmp_path: Path) -> None:
    record = {"id": "7", "conversations": [{"from": "human", "value": "word " * 100}] * 2}
    path = write(tmp_path / "big.json", json.dumps([record] * 20_000))
    assert path.stat().st_size > 20_000_000
    tracemalloc.start()
    assert sum(1 for _ in stream.elements(path)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000
