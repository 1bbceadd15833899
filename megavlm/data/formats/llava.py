"""LLaVA's JSON: ``{"id", "image", "conversations": [{"from": "human"|"gpt", "value"}]}``, ``<image>`` in the text.

Source: ``docs/Finetune_Custom_Data.md`` and ``llava/train/train.py`` of github.com/haotian-liu/LLaVA. ``image`` is a
path, a list of paths (one for each ``<image>``, as LLaVA-NeXT has it), or absent for text alone. ``images`` and
``system`` beside the conversation are taken too (:mod:`megavlm.data.formats.keys`), and ``video`` and ``videos`` with
``<video>`` in the text (:mod:`megavlm.data.formats.films`).

A picture becomes ``Picture N: <img>path</img>`` and a line end where ``<image>`` stood, as Qwen-VL's fine-tuning data
has it. Coordinates in the text stay as they are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from megavlm.data.formats.base import Broken, BrokenError, Record, each, field
from megavlm.data.formats.films import MARK, films_beside, marks_in
from megavlm.data.formats.keys import SCORED, check_keys, has_roles, is_given, picture_paths, weights_of, with_system
from megavlm.data.formats.source import Source
from megavlm.data.schema import FILM_PLACEHOLDER, FilmName

_IMAGE = re.compile(r"[ \t]*<image>[ \t]*(?:\r\n?|\n)?")
_FILM = re.compile(r"[ \t]*<video>[ \t]*(?:\r\n?|\n)?")
_OWN_IMAGE = re.compile(r"</?img>")


def matches(source: Source) -> bool:
    """Whether records with conversations have an ``image``, or ``<image>`` in a turn."""
    return any(mentions_image(record) for record in source.head)


def read(source: Source) -> Iterator[Record | Broken]:
    """Yield the records.

    Raises:
        UserError: The file holds no list.
    """
    yield from convert(source.rows(), source.ignored)


def convert(entries: Iterable[Any], ignored: Counter[str], task: str | None = None) -> Iterator[Record | Broken]:
    """Convert LLaVA records.

    Args:
        entries: The records, and what is broken among them.
        ignored: Counts keys that are not used.
        task: What records are called that do not say themselves.
    """
    yield from each(entries, lambda entry: convert_one(entry, ignored, task), "id")


def turns_of(record: Record) -> list[str]:
    """Return the texts of a record's turns, as far as it has any."""
    turns = record.get("conversations")
    values = [turn.get("value") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    return [value for value in values if isinstance(value, str)]


def mentions_image(record: Record) -> bool:
    """Whether a record of conversations shows pictures or films in LLaVA's way."""
    if not isinstance(record.get("conversations"), list) or has_roles(record):
        return False
    beside = any(is_given(record.get(key)) for key in ("image", "images", "video", "videos"))
    return beside or any("<image>" in text for text in turns_of(record))


def convert_one(entry: Any, ignored: Counter[str], task: str | None = None) -> Record:
    """Convert one record; see :func:`convert`.

    Raises:
        BrokenError: It cannot be one here.
    """
    return placed(entry, _answered(field(entry, "conversations", list)), ignored, task)


def placed(
    entry: Record,
    turns: list[Any],
    ignored: Counter[str],
    task: str | None = None,
    *,
    inline: bool = False,
    films: Sequence[FilmName] | None = None,
) -> Record:
    """Convert a record of ``turns`` in LLaVA's form: its pictures come to where ``<image>`` stands.

    Args:
        entry: The record, for its other keys.
        turns: Its turns.
        ignored: Counts keys that are not used.
        task: What the record is called if it does not say itself.
        inline: Texts are kept to the letter. LLaVA's own stand with their pictures on lines of their own, and its
            trainer strips them.
        films: Its films; None for those beside the conversation.

    Raises:
        BrokenError: It cannot be one here.
    """
    turns = with_system(entry, turns)
    images = _images(entry)
    films = films_beside(entry, None, ignored) if films is None else films
    turns = _film_marks(turns) if films and not images else turns
    check_keys(entry, ignored)
    shown = seen = 0
    converted = []
    for index, turn in enumerate(turns):
        text = field(turn, "value")
        speaker = field(turn, "from")
        if _OWN_IMAGE.search(text):
            raise BrokenError("markup in text", f"turn {index} contains <img>, which would be read as a picture")
        pictures = text.count("<image>")
        if pictures and speaker in ("gpt", "assistant"):
            raise BrokenError("pictures do not match", f"turn {index} ({speaker}) has <image>; only a human's turn may")
        for _ in range(pictures):
            if shown == len(images):
                raise BrokenError(
                    "pictures do not match", f"turn {index} has more <image> than the record has pictures ({shown})"
                )
            picture = f"Picture {shown + 1}: <img>{images[shown]}</img>\n"
            text = text.replace("<image>", picture, 1) if inline else _insert(text, picture, _IMAGE)
            shown += 1
        if FILM_PLACEHOLDER in text:
            raise BrokenError("markup in text", f"turn {index} contains U+0000, which would be read as a film")
        moving = marks_in(text) if speaker not in ("gpt", "assistant") else 0
        if seen + moving > len(films):
            raise BrokenError(
                "films do not match", f"turn {index} has more <video> than the record has films ({len(films)})"
            )
        for _ in range(moving):
            picture = f"Video {seen + 1}: {FILM_PLACEHOLDER}\n"
            text = text.replace(MARK, picture, 1) if inline else _insert(text, picture, _FILM)
            seen += 1
        visual = (pictures or moving) and not inline
        converted.append({"from": speaker, "value": text.strip() if visual else text} | weights_of(turn))
    if shown < len(images):
        raise BrokenError("pictures do not match", f"{len(images)} pictures, but <image> stands {shown} times")
    if seen < len(films):
        raise BrokenError("films do not match", f"{len(films)} films, but <video> stands {seen} times")
    record: Record = {"conversations": converted} | ({"films": [one.to_tree() for one in films]} if films else {})
    record |= {key: entry[key] for key in ("id", "task", *SCORED) if entry.get(key) is not None}
    if task is not None:
        record.setdefault("task", task)
    return record


def _answered(turns: list[Any]) -> list[Any]:
    """Leave out what LLaVA's trainer does not learn: an answer before all questions, a question behind all answers."""
    speakers = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
    if len(turns) > 2 and speakers[0] in ("gpt", "assistant"):
        turns, speakers = turns[1:], speakers[1:]
    return turns[:-1] if len(turns) > 2 and speakers[-1] in ("human", "user") else turns


def _film_marks(turns: list[Any]) -> list[Any]:
    """Return the turns of a record that has films alone with ``<video>`` where LLaVA-Video's data has ``<image>``."""
    if any(marks_in(text) for text in turns_of({"conversations": turns})):
        return turns
    return [
        turn | {"value": turn["value"].replace("<image>", MARK)}
        if isinstance(turn, dict) and isinstance(turn.get("value"), str)
        else turn
        for turn in turns
    ]


def _insert(text: str, picture: str, mark: re.Pattern[str]) -> str:
    """Put a picture or film where its mark stands first, on a line of its own."""
    found = mark.search(text)
    assert found is not None
    before = text[: found.start()]
    gap = "\n" if before and not before.endswith("\n") else ""
    return before + gap + picture + text[found.end() :]


def _images(entry: Record) -> list[str]:
    images = picture_paths(entry)
    for path in images:
        if _OWN_IMAGE.search(path) or "<image>" in path:
            raise BrokenError("unsafe image path", f"image {path!r} contains markup")
    return images
