"""Questions about documents, charts, book covers and diagrams: DocVQA, ChartQA, OCR-VQA, AI2D."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from megavlm.config.errors import MissingFileError, UserError
from megavlm.evaluation.benchmarks.files import listed, make_items, number, picture_in, read_json, text, texts
from megavlm.evaluation.benchmarks.spec import BenchmarkFiles, Item

_OCRVQA_SPLITS = {"train": 1, "val": 2, "test": 3}
_AI2D_TEST = "ai2d_test_ids.csv"


def read_docvqa(source: BenchmarkFiles) -> list[Item]:
    """Read ``val_v1.0.json`` (DocVQA, rrc.cvc.uab.es): ``data`` with ``questionId``, ``image``, ``answers``.

    Raises:
        MissingFileError: the file is missing.
        UserError: it is not of this format.
    """

    def make(entry: Any) -> Iterator[Item]:
        yield Item(
            id=text(entry, "questionId"),
            question=text(entry, "question"),
            pictures=(picture_in(source.images, text(entry, "image")),),
            answers=texts(entry, "answers") if "answers" in entry else (),
        )

    found = read_json(source.data, dict)
    return make_items(source.data, enumerate(listed(source.data, found, "data")), make)


def read_chartqa(source: BenchmarkFiles) -> list[Item]:
    """Read ``test_human.json`` or ``test_augmented.json`` (vis-nlp/ChartQA): ``imgname``, ``query``, ``label``.

    Pictures lie in the image directory or a folder ``png`` in it.

    Raises:
        MissingFileError: the file is missing.
        UserError: it is not of this format.
    """

    def make(pair: tuple[int, Any]) -> Iterator[Item]:
        index, entry = pair
        name = text(entry, "imgname")
        nested = picture_in(source.images / "png", name)
        yield Item(
            id=str(index),
            question=text(entry, "query"),
            pictures=(nested if nested.is_file() else picture_in(source.images, name),),
            answers=(text(entry, "label"),),
        )

    return make_items(source.data, ((i, (i, entry)) for i, entry in enumerate(read_json(source.data, list))), make)


def read_ocrvqa(source: BenchmarkFiles) -> list[Item]:
    """Read ``dataset.json`` (ocr-vqa.github.io): books by id, each with ``questions`` and ``answers``.

    Its ``split`` is 1, 2 or 3 for train, val and test; test is taken unless ``--split`` says otherwise.
    Pictures are named by the book's id and the ending of its ``imageURL``.

    Raises:
        MissingFileError: the file is missing.
        UserError: it is not of this format, or there is no such split.
    """
    wanted = _OCRVQA_SPLITS.get(source.split or "test")
    if wanted is None:
        raise UserError(f"--split {source.split}: OCR-VQA has {', '.join(_OCRVQA_SPLITS)}")

    def make(pair: tuple[str, Any]) -> Iterator[Item]:
        key, entry = pair
        if number(entry, "split") != wanted:
            return
        questions, answers = texts(entry, "questions"), texts(entry, "answers")
        if len(questions) != len(answers):
            raise UserError(f"{len(questions)} questions, but {len(answers)} answers")
        name = key + (PurePosixPath(text(entry, "imageURL", "")).suffix or ".jpg")
        for index, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            yield Item(f"{key}#{index}", question, (picture_in(source.images, name),), (answer,))

    found = read_json(source.data, dict)
    return make_items(source.data, ((key, (key, entry)) for key, entry in found.items()), make)


def read_ai2d(source: BenchmarkFiles) -> list[Item]:
    """Read AI2D's folder (allenai.org/data/diagrams): ``questions/*.json``, ``images`` or ``abc_images``.

    The pictures listed in ``ai2d_test_ids.csv`` (published apart, put it into the folder or name it with
    ``--annotations``) are the test set. ``--split all`` takes every picture.

    Raises:
        MissingFileError: the folder, or the list of test pictures, is missing.
        UserError: a file is not of this format, or there is no such split.
    """
    folder = source.data / "questions"
    files = sorted(folder.glob("*.json"))
    if not files:
        raise MissingFileError(f"{folder}: no questions; give AI2D's folder, with questions/ and images/ in it")
    chosen = _ai2d_pictures(source)

    def make(path: Path) -> Iterator[Item]:
        found = read_json(path, dict)
        name = text(found, "imageName")
        if chosen is not None and PurePosixPath(name).stem not in chosen:
            return
        questions = found.get("questions")
        if not isinstance(questions, dict):
            raise UserError("has no object 'questions'")
        for question, entry in questions.items():
            options, right = texts(entry, "answerTexts"), number(entry, "correctAnswer")
            if not 0 <= right < len(options):
                raise UserError(f"{question!r}: 'correctAnswer' is {right} of {len(options)} options")
            labelled = source.images / "abc_images" / name
            plain = picture_in(source.images / "images", name)
            picture = labelled if entry.get("abcLabel") and labelled.is_file() else plain
            yield Item(text(entry, "questionId"), question, (picture,), (options[right],))

    return make_items(folder, ((path.name, path) for path in files), make)


def _ai2d_pictures(source: BenchmarkFiles) -> set[str] | None:
    """Names of the pictures to ask about, without ending; None for all."""
    if source.split == "all":
        return None
    if source.split not in (None, "test"):
        raise UserError(f"--split {source.split}: AI2D has test, all")
    path = source.annotations or source.data / _AI2D_TEST
    if not path.is_file():
        raise MissingFileError(f"{path}: no list of test pictures; put it there, or give --split all")
    return {PurePosixPath(line.strip()).stem for line in path.read_text(encoding="utf-8").splitlines() if line.strip()}
