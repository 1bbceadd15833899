"""Question answering, in the files that the benchmarks publish for training.

=============  ============================================================================================
VQAv2, OK-VQA  ``{"questions": [{"question_id", "image_id", "question"}], "data_subtype"}``, and in the file of
               ``--annotations`` ``{"annotations": [{"question_id", "answers": [{"answer"}],
               "multiple_choice_answer"}]}`` (visualqa.org/vqa_v2_teaser)
VizWiz         ``[{"image", "question", "answers": [{"answer"}]}]`` (vizwiz.org)
TextVQA        ``{"data": [{"question_id", "image_id", "question", "answers": [".."]}]}`` (textvqa.org)
DocVQA         ``{"data": [{"questionId", "image", "question", "answers": [".."]}]}`` (docvqa.org)
GQA            ``{"ID": {"imageId", "question", "answer"}}`` (cs.stanford.edu/people/dorarad/gqa)
OCR-VQA        ``{"ID": {"imageURL", "questions": [".."], "answers": [".."], "split"}}`` (ocr-vqa.github.io); 2 and 3,
               validation and test, are refused
Visual Genome  ``[{"id", "qas": [{"qa_id", "question", "answer"}]}]`` (visualgenome.org, question_answers.json)
=============  ============================================================================================

Each question is a record in Qwen-VL's words, ``{question} Answer:``. Of several people's answers the most common is
taken, of DocVQA's wordings the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from megavlm.config.errors import UserError
from megavlm.data.formats.base import (
    Broken,
    BrokenError,
    Record,
    field,
    identity,
    most_common,
    pair,
    plain,
)
from megavlm.data.formats.source import Source

Result = Iterator[Record | Broken]


def matches(source: Source) -> bool:
    """Whether it is one of the shapes above."""
    return _shape(source) is not None


def read(source: Source) -> Result:
    """Yield a record for each question.

    Raises:
        MissingFileError: The annotations are missing.
        UserError: The file has none of the shapes, or VQAv2's questions come without answers.
    """
    shape = _shape(source)
    if shape is None:
        raise UserError(f"{source.path} is no question file that --format vqa knows (docs/data.md lists them)")
    if (shape is _questions) != (source.annotations is not None):
        if source.annotations is None:
            raise UserError(f"{source.path} holds questions only; give the answers with --annotations FILE")
        raise UserError(f"--annotations: {source.path} has its answers itself; leave it out")
    yield from shape(source)


def _shape(source: Source) -> Any:
    """The reader of a file's shape, or None."""
    if source.head:
        first = source.head[0]
        if isinstance(first.get("qas"), list):
            return _visual_genome
        return _vizwiz if {"image", "question"} <= first.keys() and "conversations" not in first else None
    if isinstance(source.outline.get("questions"), list):
        return _questions
    if isinstance(source.outline.get("data"), list):
        return _data
    value = next(iter(source.outline.values()), None)
    if isinstance(value, dict) and {"question", "imageId"} <= value.keys():
        return _gqa
    return _ocr_vqa if isinstance(value, dict) and {"questions", "answers"} <= value.keys() else None


def _record(source: Source, record_id: Any, images: Sequence[str], question: Any, answer: Any) -> Record | Broken:
    try:
        if not isinstance(question, str):
            raise BrokenError("bad record", "'question' is no text")
        asked = plain(question, "the question")
        given = plain(_answer(answer), "the answer")
        record = pair(record_id, "vqa", source.find_image(images), f"{asked} Answer:", given)
        return record | {"answers": _texts_of(answer) or [given]}  # all of them, for megavlm eval
    except BrokenError as error:
        return error.about(record_id)


def _answer(answer: Any) -> str:
    text = _text_of(answer)
    if text is None:
        raise BrokenError("no answer", "the question has no answer")
    return text


def _text_of(answer: Any) -> str | None:
    """One answer of what a file gives: text, a list of texts, or a list of ``{"answer": text}``."""
    if isinstance(answer, list):
        texts = _texts_of(answer)
        answer = most_common(texts) if texts else None
    return answer if isinstance(answer, str) else None


def _texts_of(answer: Any) -> list[str]:
    """All answers of what a file gives, where that is a list."""
    given = (
        [each.get("answer") if isinstance(each, dict) else each for each in answer] if isinstance(answer, list) else []
    )
    return [text for text in given if isinstance(text, str)]


def _questions(source: Source) -> Result:
    assert source.annotations is not None
    given = source.below(source.annotations)
    if given.is_list or not isinstance(given.outline.get("annotations"), list):
        raise UserError(f"--annotations {source.annotations} has no list 'annotations'; give VQAv2's annotations file")
    answers = {
        entry["question_id"]: _text_of(entry.get("multiple_choice_answer") or entry.get("answers"))
        for entry in given.rows("annotations")
        if isinstance(entry, dict) and isinstance(entry.get("question_id"), str | int)
    }
    subset = source.outline.get("data_subtype")
    for entry in source.rows("questions"):
        record_id = identity(entry, "question_id")
        try:
            images = _coco(field(entry, "image_id", (str, int)), subset)
        except BrokenError as error:
            yield error.about(record_id)
            continue
        yield _record(source, record_id, images, entry.get("question"), answers.get(record_id))


def _coco(image_id: str | int, subset: Any) -> list[str]:
    """Where COCO's picture may lie: named as in 2014, or as in 2017."""
    name = str(image_id)
    number = f"{int(name):012d}.jpg" if name.isdecimal() and len(name) <= 12 else f"{name}.jpg"
    splits = [subset] if isinstance(subset, str) and subset.isalnum() else ["train2014", "val2014"]
    old = [path for split in splits for path in (f"COCO_{split}_{number}", f"{split}/COCO_{split}_{number}")]
    return [*old, number, f"train2017/{number}", f"val2017/{number}"]


def _data(source: Source) -> Result:
    """TextVQA and DocVQA."""
    for entry in source.rows("data"):
        record_id = identity(entry, "question_id", "questionId")
        try:
            answers = entry.get("answers") if isinstance(entry, dict) else None
            if isinstance(entry, dict) and isinstance(entry.get("image"), str):
                image = entry["image"]
                images = [image, PurePosixPath(image).name]
                answers = answers[:1] if isinstance(answers, list) else answers
            else:
                name = f"{field(entry, 'image_id', (str, int))}.jpg"
                images = [name, f"train_images/{name}"]
        except BrokenError as error:
            yield error.about(record_id)
            continue
        yield _record(source, record_id, images, entry.get("question"), answers)


def _vizwiz(source: Source) -> Result:
    for entry in source.rows():
        record_id = identity(entry, "image")
        try:
            image = field(entry, "image")
        except BrokenError as error:
            yield error.about(record_id)
            continue
        answer = entry.get("answers", entry.get("answer"))
        yield _record(source, record_id, [image, f"train/{image}"], entry.get("question"), answer)


def _gqa(source: Source) -> Result:
    for record_id, entry in source.members():
        try:
            image = f"{field(entry, 'imageId', (str, int))}.jpg"
        except BrokenError as error:
            yield error.about(record_id)
            continue
        yield _record(source, record_id, [image, f"images/{image}"], entry.get("question"), entry.get("answer"))


def _ocr_vqa(source: Source) -> Result:
    for record_id, entry in source.members():
        try:
            if isinstance(entry, dict) and entry.get("split") in (2, 3):
                raise BrokenError("held out", "the book belongs to the validation or test split")
            questions, answers = field(entry, "questions", list), field(entry, "answers", list)
            if len(questions) != len(answers):
                raise BrokenError("no answer", f"{len(questions)} questions, but {len(answers)} answers")
        except BrokenError as error:
            yield error.about(record_id)
            continue
        url = entry.get("imageURL")
        suffix = PurePosixPath(urlsplit(url).path).suffix if isinstance(url, str) else ""
        images = [f"{record_id}{suffix or '.jpg'}", f"{record_id}.jpg", f"images/{record_id}{suffix or '.jpg'}"]
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            yield _record(source, f"{record_id}-{number}", images, question, answer)


def _visual_genome(source: Source) -> Result:
    for entry in source.rows():
        image_id = identity(entry, "id", "image_id")
        try:
            qas = field(entry, "qas", list)
        except BrokenError as error:
            yield error.about(image_id)
            continue
        images = [f"VG_100K/{image_id}.jpg", f"VG_100K_2/{image_id}.jpg", f"{image_id}.jpg"]
        for qa in qas:
            record = qa if isinstance(qa, dict) else {}
            yield _record(source, identity(qa, "qa_id"), images, record.get("question"), record.get("answer"))
