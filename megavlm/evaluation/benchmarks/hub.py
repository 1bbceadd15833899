"""Benchmarks in the parquet files of Hugging Face's hub: columns as lmms-lab publishes them, and MMMU/MMMU.

Each function takes the rows of a file, with a name for errors, and returns their items. The columns were read in
lmms-eval 0.7.3 (``tasks/*/utils.py``), which evaluates from these files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megavlm.config.errors import UserError
from megavlm.evaluation.benchmarks.choices import mmbench_items, mmmu_items, option, seed_items
from megavlm.evaluation.benchmarks.files import make_items, objects, text, texts
from megavlm.evaluation.benchmarks.spec import LETTERS, BenchmarkFiles, Item, Picture, StoredPicture

_Row = dict[str, Any]
_Make = Callable[[str, _Row], Iterator[Item]]
"""A row's number in the whole set, and the row, to items."""
Rows = Callable[[BenchmarkFiles, Sequence[tuple[str, _Row]]], list[Item]]
"""Rows, each with a name for errors, to items."""


def _reader(make: _Make) -> Rows:
    def read(source: BenchmarkFiles, rows: Sequence[tuple[str, _Row]]) -> list[Item]:
        entries = ((name, (str(index), row)) for index, (name, row) in enumerate(rows))
        return make_items(source.data, entries, lambda pair: make(*pair), "in")

    return read


def _shown(row: _Row, column: str = "image") -> tuple[Picture, ...]:
    value = row.get(column)
    pictures = value if isinstance(value, list) else [value]
    if not pictures or not all(isinstance(one, StoredPicture) for one in pictures):
        raise UserError(f"has no picture {column!r}")
    return tuple(pictures)


def _people(row: _Row) -> tuple[str, ...]:
    """Ten people's answers: objects as in VQA, or plain texts; none in a test set."""
    found = row.get("answers") or []
    if found and isinstance(found[0], dict):
        return tuple(text(one, "answer") for one in objects(row, "answers"))
    return texts({"answers": found}, "answers")


def _vqa(_: str, row: _Row) -> Iterator[Item]:
    kind = text(row, "answer_type", text(row, "category", "all"))
    yield Item(text(row, "question_id"), text(row, "question"), _shown(row), _people(row), kind=kind)


def _textvqa(_: str, row: _Row) -> Iterator[Item]:
    yield Item(text(row, "question_id"), text(row, "question"), _shown(row), _people(row))


def _docvqa(_: str, row: _Row) -> Iterator[Item]:
    yield Item(text(row, "questionId"), text(row, "question"), _shown(row), _people(row))


def _chartqa(index: str, row: _Row) -> Iterator[Item]:
    yield Item(index, text(row, "question"), _shown(row), (text(row, "answer"),), kind=text(row, "type", "all"))


def _ai2d(index: str, row: _Row) -> Iterator[Item]:
    options = texts(row, "options")
    yield Item(index, text(row, "question"), _shown(row), (options[option(row, "answer", len(options))],))


def _scienceqa(index: str, row: _Row) -> Iterator[Item]:
    if row.get("image") is None:  # a question without a picture
        return
    choices = texts(row, "choices")
    yield Item(
        id=index,
        question=text(row, "question"),
        pictures=_shown(row),
        answers=(LETTERS[option(row, "answer", len(choices))],),
        choices=choices,
        hint=text(row, "hint", ""),
        kind=text(row, "subject", "all"),
    )


def _yes_no(row: _Row) -> tuple[str, ...]:
    answer = text(row, "answer", "").strip().lower()
    if answer not in ("yes", "no", ""):
        raise UserError(f"'answer' is {answer!r}, which is not yes or no")
    return (answer,) if answer else ()


def _mme(index: str, row: _Row) -> Iterator[Item]:
    kind = text(row, "category")
    unit = f"{kind}/{Path(text(row, 'question_id')).stem}"
    yield Item(f"{unit}#{index}", text(row, "question").strip(), _shown(row), _yes_no(row), kind=kind, unit=unit)


def _pope(_: str, row: _Row) -> Iterator[Item]:
    kind = text(row, "category", "all")
    yield Item(f"{kind}#{text(row, 'question_id')}", text(row, "question"), _shown(row), _yes_no(row), kind=kind)


def _captions(column: str, key: str, kind: str = "") -> _Make:
    """Captions in ``column`` of the picture that ``key`` names."""

    def make(_: str, row: _Row) -> Iterator[Item]:
        captions = texts(row, column) if row.get(column) else ()
        yield Item(text(row, key), "", _shown(row), captions, kind=text(row, kind, "all"))

    return make


def _seed(source: BenchmarkFiles, rows: Sequence[tuple[str, _Row]]) -> list[Item]:
    return make_items(source.data, rows, lambda row: seed_items(source, row, {}, _shown), "in")


def _mmbench(source: BenchmarkFiles, rows: Sequence[tuple[str, _Row]]) -> list[Item]:
    def make(row: _Row) -> Iterator[Item]:
        plain = {name: "" if cell is None else str(cell) for name, cell in row.items() if name != "image"}
        yield from mmbench_items(source, plain, _shown(row)[0])

    return make_items(source.data, rows, make, "in")


def _mmmu(source: BenchmarkFiles, rows: Sequence[tuple[str, _Row]]) -> list[Item]:
    return make_items(source.data, rows, lambda row: mmmu_items(source, row), "in")


ROWS: dict[str, Rows] = {
    "vqav2": _reader(_vqa),
    "okvqa": _reader(_vqa),
    "textvqa": _reader(_textvqa),
    "vizwiz": _reader(_vqa),
    "docvqa": _reader(_docvqa),
    "chartqa": _reader(_chartqa),
    "ai2d": _reader(_ai2d),
    "scienceqa": _reader(_scienceqa),
    "mmbench": _mmbench,
    "mmbench-cn": _mmbench,
    "seed": _seed,
    "mmmu": _mmmu,
    "mme": _reader(_mme),
    "pope": _reader(_pope),
    "flickr30k": _reader(_captions("caption", "img_id")),
    "nocaps": _reader(_captions("annotations_captions", "image_id", "image_domain")),
    "coco-captions": _reader(_captions("answer", "question_id")),
}
"""By benchmark."""
