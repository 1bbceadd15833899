"""Questions with ten human answers: VQAv2, OK-VQA, TextVQA, VizWiz; and GQA with one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from megavlm.config.errors import MissingFileError, UserError
from megavlm.evaluation.benchmarks.files import listed, make_items, number, objects, picture_in, read_json, text, texts
from megavlm.evaluation.benchmarks.spec import BenchmarkFiles, Item


def read_vqa(source: BenchmarkFiles) -> list[Item]:
    """Read VQA's pair of files (visualqa.org, okvqa.allenai.org): ``..questions.json`` and ``..annotations.json``.

    Pictures are COCO's, ``COCO_val2014_000000000042.jpg``, in the image directory or a folder ``val2014`` in it.

    Raises:
        MissingFileError: a file is missing.
        UserError: a file is not of this format, or a question has no annotation.
    """
    questions = read_json(source.data, dict)
    # Questions of test-dev2015 are about the pictures of test2015.
    subset = re.sub(r"-\w+?(?=20\d\d)", "", str(questions.get("data_subtype") or "val2014"))
    answered = _annotations(source)

    def make(entry: Any) -> Iterator[Item]:
        key = number(entry, "question_id")
        found = answered.get(key, {})
        if source.answers and not found:
            raise UserError(f"question {key} has no annotation")
        name = f"COCO_{subset}_{number(entry, 'image_id'):012d}.jpg"
        nested = source.images / subset / name
        yield Item(
            id=str(key),
            question=text(entry, "question"),
            pictures=(nested if nested.is_file() else source.images / name,),
            answers=tuple(text(one, "answer") for one in objects(found, "answers")),
            kind=text(found, "answer_type", "all"),
        )

    return make_items(source.data, enumerate(listed(source.data, questions, "questions")), make)


def _annotations(source: BenchmarkFiles) -> dict[int, Any]:
    """The annotations by question id; empty for a test set."""
    if not source.answers:
        return {}
    path = source.annotations
    if path is None:
        name = source.data.name.replace("OpenEnded_", "").replace("questions", "annotations")
        path = source.data.with_name(name)
        if path == source.data or not path.is_file():
            raise MissingFileError(f"no answers: {path} is not there; give --annotations FILE, or --predict-only")
    found = listed(path, read_json(path, dict), "annotations")
    try:
        return {number(entry, "question_id"): entry for entry in found}
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_textvqa(source: BenchmarkFiles) -> list[Item]:
    """Read ``TextVQA_0.5.1_val.json`` (textvqa.org); pictures are ``IMAGE_ID.jpg``.

    Raises:
        MissingFileError: the file is missing.
        UserError: it is not of this format.
    """

    def make(entry: Any) -> Iterator[Item]:
        yield Item(
            id=text(entry, "question_id"),
            question=text(entry, "question"),
            pictures=(picture_in(source.images, text(entry, "image_id") + ".jpg"),),
            answers=texts(entry, "answers") if "answers" in entry else (),
        )

    found = read_json(source.data, dict)
    return make_items(source.data, enumerate(listed(source.data, found, "data")), make)


def read_vizwiz(source: BenchmarkFiles) -> list[Item]:
    """Read VizWiz's ``val.json`` (vizwiz.org, VQA task): a list with ``image``, ``question``, ``answers``.

    Raises:
        MissingFileError: the file is missing.
        UserError: it is not of this format.
    """

    def make(entry: Any) -> Iterator[Item]:
        name = text(entry, "image")
        yield Item(
            id=name,
            question=text(entry, "question"),
            pictures=(picture_in(source.images, name),),
            answers=tuple(text(one, "answer") for one in objects(entry, "answers")),
            kind=text(entry, "answer_type", "all"),
        )

    return make_items(source.data, enumerate(read_json(source.data, list)), make)


def read_gqa(source: BenchmarkFiles) -> list[Item]:
    """Read ``testdev_balanced_questions.json`` (GQA, cs.stanford.edu): an object by question id.

    Raises:
        MissingFileError: the file is missing.
        UserError: it is not of this format.
    """

    def make(pair: tuple[str, Any]) -> Iterator[Item]:
        key, entry = pair
        types = entry.get("types") if isinstance(entry, dict) else None
        yield Item(
            id=key,
            question=text(entry, "question"),
            pictures=(picture_in(source.images, text(entry, "imageId") + ".jpg"),),
            answers=(text(entry, "answer"),) if "answer" in entry else (),
            kind=text(types, "structural", "all"),
        )

    found = read_json(source.data, dict)
    return make_items(source.data, ((key, (key, entry)) for key, entry in found.items()), make)
