"""Held-out records of one's own, in any format that ``megavlm prepare`` reads: read, checked, turned into questions."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megavlm.config.errors import MissingFileError, UserError
from megavlm.config.schema import Recipe
from megavlm.data.chat import encode_prompt
from megavlm.data.films.film import Film
from megavlm.data.films.plan import FilmError
from megavlm.data.films.source import FilePart
from megavlm.data.formats import Broken, BrokenError, Source
from megavlm.data.formats.base import is_inside
from megavlm.data.formats.films import MARK, settled_films, stored_film
from megavlm.data.formats.keys import has_roles
from megavlm.data.formats.pictures import settled
from megavlm.data.formats.qwen_vl import conversation
from megavlm.data.images import MAX_BYTES, image_grids, image_runs
from megavlm.data.media import TokenGrid, plan_of
from megavlm.data.preparing import Preparation, check_there, choose_format, open_source
from megavlm.data.schema import (
    FILM_PLACEHOLDER,
    VISUAL,
    Conversation,
    FilmName,
    Turn,
    check_unicode,
    parse_conversation,
    shown_films,
)
from megavlm.data.template import TemplateError
from megavlm.data.tokenizer import Tokenizer
from megavlm.evaluation.benchmarks.questions import Question
from megavlm.evaluation.benchmarks.spec import LETTERS, Item, Picture, Shown, StoredFilm, StoredPicture, shown_data

logger = logging.getLogger(__name__)

_FIELD = re.compile(r"\{(\w+)\}")
_FIELDS = ("pictures", "question", "options")
_CAPTIONS = "coco-captions"
"""The format with a record for each caption: those of a picture are references of one question."""


@dataclass(frozen=True)
class HeldOutRecord:
    """A record to be answered: its first question."""

    id: str
    """Unique in its file."""
    task: str
    """What scores are grouped by; "all" where the record has none."""
    question: tuple[Turn, ...]
    """The turns up to the answer."""
    answers: tuple[str, ...]
    """The record's ``answers`` or ``answer``, or its first assistant turn."""
    choices: Sequence[str]
    """The answers of a closed question; empty for an open one."""
    images: Sequence[Shown]
    """The pictures and films that the question shows, in their order."""
    metric: str | None = None
    """The record's ``metric``, which wins over the command's."""

    @property
    def answer(self) -> str:
        """The first of the right answers."""
        return self.answers[0]

    def files(self) -> list[bytes | Film]:
        """Read the pictures, and open the films.

        Raises:
            FilmError: one of these is no film that can be read.
        """
        return [shown_data(one) for one in self.images]


def read_records(
    data: Path | str, images: Path | str | None = None, form: str | None = None, annotations: Path | None = None
) -> list[HeldOutRecord]:
    """Return the records of what ``megavlm prepare`` would read.

    Args:
        data: file, directory or URL. Conversations may be in Qwen-VL's form and in LLaVA's within one file.
        images: directory, or URL, of the pictures and films, which must all be there; None for where the data is.
        form: name of the format; None for what it looks like.
        annotations: of the format ``vqa``: the answers, where they are in a file of their own.

    Raises:
        MissingFileError: the data, a picture or a film is missing.
        UserError: a record is wrong; the message has its index.
    """
    options = Preparation(data, images, form, annotations=annotations)
    check_there(options)
    found: list[HeldOutRecord] = []
    with tempfile.TemporaryDirectory(prefix="megavlm-eval-") as fetched:
        source = open_source(options, Path(fetched) / "source")
        chosen = _format(options, source)
        folder = options.folder
        bases = [folder] if isinstance(folder, str) else [str(folder.absolute()), str(folder.resolve())]
        entries = _conversations(source) if chosen is None else chosen.load().read(source)
        for index, entry in enumerate(entries):
            try:
                if isinstance(entry, Broken):
                    raise UserError(entry.reason)
                found.append(_record(_settled(entry, bases, source), str(index), source))
            except MissingFileError as error:
                raise MissingFileError(f"{data}: record {index}: {error}") from None
            except UserError as error:
                raise UserError(f"{data}: record {index}: {error}") from None
    if source.ignored:
        counts = ", ".join(f"{key} ({number} records)" for key, number in source.ignored.most_common())
        logger.warning("%s: keys of the records that are not used: %s", data, counts)
    if chosen is not None and chosen.name == _CAPTIONS:
        found = _merged(found)
    return _unique(found)


def _format(options: Preparation, source: Source) -> Any:
    """Return the format; None for conversations, each of which says by itself in whose form it is."""
    plain = options.format is None and options.annotations is None and not source.is_folder and source.is_list
    if plain and any(isinstance(one.get("conversations"), list) and not has_roles(one) for one in source.head):
        return None
    if plain and not source.head:
        return None
    return choose_format(options, source)


def _conversations(source: Source) -> Iterator[Any]:
    for entry in source.rows():
        try:
            yield entry if isinstance(entry, Broken) else conversation(entry, source.ignored)
        except UserError as error:
            yield Broken(None, "bad record", str(error))


def _settled(entry: Any, bases: Sequence[str], source: Source) -> Any:
    return settled_films(settled(entry, bases, source.pictures), bases, source.pictures)


def _record(record: Any, index: str, source: Source) -> HeldOutRecord:
    parsed = parse_conversation(record)
    question, answer = _first_exchange(parsed)
    answers, choices = _scored(record, answer)
    pictures, films = iter(parsed.images), iter(parsed.films)
    metric = record.get("metric")
    return HeldOutRecord(
        id=parsed.id or index,
        task=parsed.task or "all",
        question=question,
        answers=answers,
        choices=choices,
        images=[
            _film(next(films), source) if film else _picture(next(pictures), source) for film in shown_films(question)
        ],
        metric=None if metric is None else _text(metric, "metric"),
    )


def _picture(name: str, source: Source) -> Picture:
    """Return a picture: its path, its bytes where it came with the record, or how it is fetched.

    Raises:
        MissingFileError: there is none.
    """
    if name in source.pictures:
        return source.pictures[name]
    if not source.has_image(name):
        raise MissingFileError(f"no image {name!r} in {source.where}")
    if source.store is None:
        return source.images / name
    return StoredPicture(f"{source.where}/{name}", functools.partial(source.store.read, name, MAX_BYTES))


def _film(name: FilmName, source: Source) -> StoredFilm:
    """Return how a film is opened; what has come with the record is kept, a file is read as far as it is needed.

    Raises:
        MissingFileError: it, or one of its frames, is missing.
    """
    paths = name.frames or (name.path,)
    own = replace(source, pictures={path: source.pictures[path] for path in paths if path in source.pictures})
    for path in paths:
        folder = not name.frames and own.store is None and is_inside(path) and (own.images / path).is_dir()
        if not folder and not own.has_image(path):
            raise MissingFileError(f"no {'frame' if name.frames else 'film'} {path!r} in {own.where}")
    where = paths[0] if paths[0] in own.pictures else f"{own.where}/{paths[0]}"
    if name.to_tree() != name.path:  # other frames, or another rate, are another film
        where = f"{where} ({hashlib.sha256(json.dumps(name.to_tree()).encode()).hexdigest()[:12]})"
    index: list[bytes] = []

    def opened() -> Film:
        data = _film_data(name, own)
        if not index:
            index.append(Film(data).index().to_bytes())
        return Film(data, index[0])

    return StoredFilm(where, opened)


def _film_data(name: FilmName, source: Source) -> bytes | FilePart:
    """Return a film's file, or its frames as one.

    Raises:
        FilmError: it is not there any more, or its frames are none.
    """
    with tempfile.TemporaryDirectory(prefix="megavlm-eval-") as folder:
        made = Path(folder) / "film"
        try:
            data = stored_film(name, source, made, allow_links=True)  # as pictures are here
        except BrokenError as error:
            raise FilmError(error.cause, str(error)) from None
        if data == made:
            return made.read_bytes()
    return data if isinstance(data, bytes) else FilePart(str(data), 0, data.stat().st_size)


def _merged(records: Sequence[HeldOutRecord]) -> list[HeldOutRecord]:
    """Return records with the same pictures and question as one, with the answers of all."""
    found: dict[Any, HeldOutRecord] = {}
    for one in records:
        key = (tuple(map(str, one.images)), one.question)
        before = found.get(key)
        found[key] = one if before is None else replace(before, answers=(*before.answers, *one.answers))
    return list(found.values())


def _unique(records: Sequence[HeldOutRecord]) -> list[HeldOutRecord]:
    """Return the records with identifiers by which predictions are told from each other."""
    counts = Counter(record.id for record in records)
    return [
        record if counts[record.id] == 1 else replace(record, id=f"{record.id}#{index}")
        for index, record in enumerate(records)
    ]


def _text(value: Any, key: str) -> str:
    """A field that is text or a number, as text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{key!r} must be text, not {type(value).__name__}")
    check_unicode(str(value), repr(key))
    return str(value)


def _scored(record: Any, answer: str) -> tuple[tuple[str, ...], list[str]]:
    """The right answers, and the options of a closed question."""
    given, several, choices = record.get("answer"), record.get("answers"), record.get("choices") or []
    if not isinstance(choices, list):
        raise UserError(f"'choices' must be a list, not {type(choices).__name__}")
    if several is not None and (not isinstance(several, list) or not several):
        raise UserError("'answers' must be a list that is not empty")
    if several is not None and given is not None:
        raise UserError("the record has 'answer' and 'answers'; keep one")
    if several is not None:
        answers = tuple(_text(one, "answers") for one in several)
    else:
        answers = (answer if given is None else _text(given, "answer"),)
    return answers, [_text(one, "choices") for one in choices]


def _first_exchange(conversation: Conversation) -> tuple[tuple[Turn, ...], str]:
    """The turns up to the first answer, and that answer."""
    turns = conversation.turns
    first = next(i for i, turn in enumerate(turns) if turn.role == "assistant")
    return turns[:first], turns[first].text


def check_prompt(template: str) -> None:
    """Check a template of ``--prompt``.

    Raises:
        UserError: it names an unknown field, or no question.
    """
    names = _FIELD.findall(template)
    strange = [name for name in names if name not in _FIELDS]
    if strange:
        raise UserError(
            f"--prompt: no field {{{strange[0]}}}; there are {', '.join(f'{{{name}}}' for name in _FIELDS)}"
        )
    if "question" not in names:
        raise UserError("--prompt: {question} is missing")


def asked(record: HeldOutRecord, template: str | None) -> tuple[Turn, ...]:
    """Return the turns of a record as they are asked: the last one written by ``template``.

    ``{question}`` is its text, ``{options}`` its choices with letters, a line each, and ``{pictures}`` its pictures
    and films, which else stay where they are in the question.

    Raises:
        UserError: the template shows options, and the record has none.
    """
    if template is None:
        return record.question
    last = record.question[-1]
    text, pictures = last.text, ""
    if "{pictures}" in template:
        pictures = "".join(VISUAL.findall(text))
        text = _SHOWN.sub("", text).strip()
    if "{options}" in template and not record.choices:
        raise UserError(f"--prompt: record {record.id} has no 'choices' for {{options}}; leave the field out")
    if "{options}" in template and len(record.choices) > len(LETTERS):
        raise UserError(
            f"--prompt: record {record.id} has {len(record.choices)} 'choices', more than there are letters "
            f"({len(LETTERS)}); leave {{options}} out, and write them into the question"
        )
    options = "\n".join(f"{letter}. {one}" for letter, one in zip(LETTERS, record.choices, strict=False))
    values = {"pictures": pictures, "question": text, "options": options}
    return (*record.question[:-1], replace(last, text=_FIELD.sub(lambda found: values[found[1]], template)))


_SHOWN = re.compile(rf"(?:(?:Picture|Video) \d+: ?)?(?:{VISUAL.pattern})\n?")


def make_questions(
    records: Sequence[HeldOutRecord], tokenizer: Tokenizer, recipe: Recipe, template: str | None
) -> list[Question]:
    """Return the question of each record; one whose text, picture or film cannot be asked has its ``problem``.

    Raises:
        UserError: the prompt's template, or the model's, has no form for a record.
    """
    plan, found = plan_of(recipe.model), []
    for record in records:
        turns = asked(record, template)
        text = turns[-1].text.replace(FILM_PLACEHOLDER, MARK)
        item = Item(record.id, text, tuple(record.images), record.answers, kind=record.task)
        grids: tuple[TokenGrid, ...] = ()
        try:
            if plan.films is None and any(shown_films(turns)):
                raise FilmError("not read", "model.video.kind is none; set it to the family's film plan")
            files = functools.cache(record.files)  # a film is opened once, wherever it is
            runs = image_runs(plan, len(record.images), files)
            grids = image_grids(recipe.model, len(record.images), files)
            tokens, problem = encode_prompt(turns, tokenizer, runs, recipe.data.system_message), ""
        except TemplateError:
            raise
        except UserError as error:
            tokens, problem = np.zeros(0, np.int64), str(error)
        found.append(Question(item, text, tokens, (), problem, grids))
    return found
