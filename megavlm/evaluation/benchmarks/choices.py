"""Closed questions with lettered options: ScienceQA, MMBench, SEED-Bench, MMMU."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megavlm.config.errors import UserError
from megavlm.data.schema import IMAGE_PLACEHOLDER
from megavlm.evaluation.benchmarks.files import (
    from_base64,
    listed,
    make_items,
    number,
    picture_in,
    read_json,
    read_lines,
    read_table,
    text,
    texts,
)
from megavlm.evaluation.benchmarks.spec import LETTERS, BenchmarkFiles, Item, Picture, StoredPicture

_ROTATION = 1_000_000
"""MMBench gives the k-th rotation of question i the index i + k million."""
_MOST_OPTIONS = 5
"""Qwen-VL scores the letters A to E."""
_POINTER = 64
"""A picture's field this short is the index of the row that has the picture."""
_MMMU_IMAGE = re.compile(r"<image (\d)>")


def option(entry: Any, name: str, count: int) -> int:
    """Return a field that is the number of one of ``count`` options, from 0.

    Raises:
        UserError: it is missing, or something else.
    """
    right = number(entry, name)
    if not 0 <= right < count:
        raise UserError(f"{name!r} is {right} of {count} options")
    return right


def read_scienceqa(source: BenchmarkFiles) -> list[Item]:
    """Read ``problems.json`` (lupantech/ScienceQA); those with a picture, which lies at ``SPLIT/ID/image.png``.

    Raises:
        MissingFileError: the file is missing.
        UserError: it is not of this format.
    """
    split = source.split or "test"

    def make(pair: tuple[str, Any]) -> Iterator[Item]:
        key, entry = pair
        if text(entry, "split") != split or not entry.get("image"):
            return
        choices = texts(entry, "choices")
        right = option(entry, "answer", len(choices))
        nested = picture_in(source.images / split / key, text(entry, "image"))
        picture = nested if nested.is_file() else picture_in(source.images / key, text(entry, "image"))
        yield Item(
            id=key,
            question=text(entry, "question"),
            pictures=(picture,),
            answers=(LETTERS[right],),
            choices=choices,
            hint=text(entry, "hint", ""),
            kind=text(entry, "subject", "all"),
        )

    found = read_json(source.data, dict)
    return make_items(source.data, ((key, (key, entry)) for key, entry in found.items()), make)


def read_mmbench(source: BenchmarkFiles) -> list[Item]:
    """Read MMBench's table (``mmbench_dev_20230712.tsv``, ``MMBench_DEV_EN.tsv``, ``MMBench_DEV_CN.tsv``).

    Each question is asked once per option, with the options rotated. A table that has the rotations as rows of
    its own (index + 1000000 per rotation) is asked as it is. Pictures are base64 in the table.

    Raises:
        MissingFileError: the file is missing.
        UserError: it is not of this format.
    """
    rows = read_table(source.data)
    whole = any(row.get("index", "").isdigit() and int(row["index"]) >= _ROTATION for row in rows)
    encoded = {row.get("index", ""): row.get("image", "") for row in rows}
    decoded: dict[str, bytes] = {}

    def make(row: dict[str, str]) -> Iterator[Item]:
        image, own = text(row, "image"), row.get("index", "")
        name = image if len(image) <= _POINTER else own
        if name not in encoded:
            raise UserError(f"'image' names row {name}, which the table does not have")
        if name not in decoded:
            decoded[name] = from_base64(encoded[name])
        yield from mmbench_items(source, row, decoded[name], rotate=not whole)

    return make_items(source.data, enumerate(rows, 1), make, "row")


def mmbench_items(
    source: BenchmarkFiles, row: Mapping[str, str], picture: Picture, *, rotate: bool = True
) -> Iterator[Item]:
    """Make the items of a row: one per option, with the options rotated; with ``rotate`` off, only the row's own.

    Raises:
        UserError: the row is not of MMBench's table.
    """
    index = number(row, "index")
    filled = [letter for letter in LETTERS[:_MOST_OPTIONS] if _present(row.get(letter))]
    choices = tuple(row[letter] for letter in filled)
    if not choices or filled != list(LETTERS[: len(choices)]):
        raise UserError(f"its options must be A, B and so on without a gap, not {', '.join(filled) or 'none'}")
    answer = row.get("answer", "")
    if source.answers and answer not in LETTERS[: len(choices)]:
        raise UserError(f"'answer' is {answer!r}, which is not one of its {len(choices)} options")
    right = LETTERS.find(answer) if answer else None
    for turn in range(len(choices) if rotate else 1):
        yield Item(
            id=str(index + turn * _ROTATION),
            question=text(row, "question"),
            pictures=(picture,),
            answers=(LETTERS[(right - turn) % len(choices)],) if right is not None else (),
            choices=choices[turn:] + choices[:turn],
            hint=row["hint"] if _present(row.get("hint")) else "",
            kind=row.get("category") or "all",
            unit=str(index % _ROTATION),
        )


def _present(value: str | None) -> bool:
    """Whether a field of a table is filled; tables written by pandas may say nan."""
    return bool(value) and value != "nan"


def read_seed(source: BenchmarkFiles) -> list[Item]:
    """Read ``SEED-Bench.json`` (AILab-CVC): its questions about images; those about videos are skipped and counted.

    Raises:
        MissingFileError: the file is missing.
        UserError: it is not of this format.
    """
    found = read_json(source.data, dict)
    types = found.get("question_type")
    names = {str(value): key for key, value in types.items()} if isinstance(types, dict) else {}

    def picture(entry: Any) -> tuple[Picture, ...]:
        name = text(entry, "data_id")
        bare = picture_in(source.images, name)
        return (bare if bare.is_file() else picture_in(source.images, name + ".jpg"),)

    questions = enumerate(listed(source.data, found, "questions"))
    return make_items(source.data, questions, lambda entry: seed_items(source, entry, names, picture))


def seed_items(
    source: BenchmarkFiles, entry: Any, names: Mapping[str, str], pictures: Callable[[Any], tuple[Picture, ...]]
) -> Iterator[Item]:
    """Make the item of a question; none of one about a video, which is counted.

    Args:
        source: where it comes from.
        entry: the question.
        names: sub-tasks by their number.
        pictures: finds its pictures.

    Raises:
        UserError: it is not of SEED-Bench's form.
    """
    if text(entry, "data_type", "image") != "image":
        source.skipped["a question about a video"] += 1
        return
    answer = text(entry, "answer", "")
    if source.answers and answer not in tuple("ABCD"):
        raise UserError(f"'answer' is {answer!r}, which is not A, B, C or D")
    kind = text(entry, "question_type_id", "all")
    yield Item(
        id=text(entry, "question_id"),
        question=text(entry, "question"),
        pictures=pictures(entry),
        answers=(answer,) if answer else (),
        choices=tuple(text(entry, f"choice_{letter}") for letter in "abcd"),
        kind=names.get(kind, kind),
    )


def read_mmmu(source: BenchmarkFiles) -> list[Item]:
    """Read MMMU's rows as JSON lines or a JSON list, with the columns of its parquet files (``hub.py`` reads those).

    ``image_1`` to ``image_7`` are null, a path in the image directory, or ``{"bytes": base64}``.

    Raises:
        MissingFileError: the file is missing.
        UserError: it is not of this format, or a question names a picture that it does not have.
    """
    lines = source.data.suffix == ".jsonl"
    rows = read_lines(source.data) if lines else enumerate(read_json(source.data, list))
    return make_items(source.data, rows, lambda row: mmmu_items(source, row), "line" if lines else "entry")


def mmmu_items(source: BenchmarkFiles, row: Any) -> Iterator[Item]:
    """Make the item of a row; its pictures are files, in base64, or stored in the parquet file.

    Raises:
        UserError: it is not of MMMU's form, or it names a picture that it does not have.
    """
    key, answer = text(row, "id"), text(row, "answer", "")
    options = row.get("options")
    if isinstance(options, str):  # the published column is a Python list, written out
        options = _python_list(options)
        if options is None:
            raise UserError("'options' is not a list")
    choices = texts({"options": options or []}, "options")
    if len(choices) > len(LETTERS):
        raise UserError(f"has {len(choices)} options")
    if choices and source.answers and answer not in LETTERS[: len(choices)]:
        raise UserError(f"'answer' is {answer!r}, which is not one of its {len(choices)} options")
    shown: list[Picture] = []

    def place(match: re.Match[str]) -> str:
        shown.append(_mmmu_picture(source, row, match[1]))
        return IMAGE_PLACEHOLDER

    question = _MMMU_IMAGE.sub(place, text(row, "question"))
    choices = tuple(_MMMU_IMAGE.sub(place, choice) for choice in choices)
    if not shown and row.get("image_1"):
        shown.append(_mmmu_picture(source, row, "1"))
        question = IMAGE_PLACEHOLDER + question
    yield Item(
        id=key,
        question=question,
        pictures=tuple(shown),
        answers=_mmmu_answers(answer, closed=bool(choices)),
        choices=choices,
        kind=re.sub(r"^(dev|validation|test)_|_\d+$", "", key),
    )


def _mmmu_answers(answer: str, *, closed: bool) -> tuple[str, ...]:
    """The references; those of an open question may be a list, written out."""
    if answer in ("", "?"):  # the test set's
        return ()
    several = _python_list(answer) if not closed and answer.startswith("[") else None
    return tuple(str(one) for one in several) if several else (answer,)


def _python_list(text: str) -> list[Any] | None:
    """The list that a text writes out; None where it writes something else."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def _mmmu_picture(source: BenchmarkFiles, row: Any, index: str) -> Picture:
    value = row.get(f"image_{index}")
    if isinstance(value, StoredPicture):
        return value
    if isinstance(value, str) and value:
        return picture_in(source.images, value)
    if isinstance(value, dict) and isinstance(value.get("bytes"), str):
        return from_base64(value["bytes"])
    raise UserError(f"names <image {index}>, but has no image_{index}")
