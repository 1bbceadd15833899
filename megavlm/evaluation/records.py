"""Held-out records: read, checked and turned into prompts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.config.errors import MissingFileError, RecipeError, UserError
from megavlm.config.schema import Recipe
from megavlm.data.chat import encode_prompt
from megavlm.data.formats import Broken, Source
from megavlm.data.formats.qwen_vl import conversation
from megavlm.data.images import ImageError, image_grids, image_runs
from megavlm.data.machine import is_file
from megavlm.data.media import plan_of
from megavlm.data.schema import IMAGE_PLACEHOLDER, Conversation, Turn, check_unicode, parse_conversation
from megavlm.data.tokenizer import Tokenizer
from megavlm.inference.prompt import Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOutRecord:
    """A record to be answered: its first question."""

    id: str
    task: str
    """What scores are grouped by; "all" where the record has none."""
    question: tuple[Turn, ...]
    """The turns up to the answer."""
    answer: str
    """The record's ``answer``, or its first assistant turn."""
    choices: Sequence[str]
    """The answers of a closed question; empty for an open one."""
    images: Sequence[Path]
    """The files that the question shows."""

    def files(self) -> list[bytes]:
        """Read these files."""
        return [path.read_bytes() for path in self.images]


def read_records(path: Path, images: Path) -> list[HeldOutRecord]:
    """Return the records of a JSON file.

    Args:
        path: JSON list, or JSON lines, of conversation records, each in Qwen-VL's form or in LLaVA's.
        images: directory of the images, which must all be there.

    Raises:
        MissingFileError: the file or an image is missing.
        UserError: a record is wrong; the message has its index.
    """
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist")
    ignored: Counter[str] = Counter()
    checked = []
    for index, entry in enumerate(_rows(path)):
        try:
            if isinstance(entry, Broken):
                raise UserError(entry.reason)
            record = conversation(entry, ignored)
            parsed = parse_conversation(record)
            question, answer = _first_exchange(parsed)
            answer, choices = _scored(record, answer)
        except UserError as error:
            raise UserError(f"{path}: record {index}: {error}") from None
        shown = parsed.images[: sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in question)]
        for name in shown:
            if not is_file(images / name):
                raise MissingFileError(f"{path}: record {index}: no image {name!r} in {images}")
        checked.append(
            HeldOutRecord(
                id=parsed.id or str(index),
                task=parsed.task or "all",
                question=question,
                answer=answer,
                choices=choices,
                images=[images / name for name in shown],
            )
        )
    if ignored:
        counts = ", ".join(f"{key} ({number} records)" for key, number in ignored.most_common())
        logger.warning("%s: keys of the records that are not used: %s", path, counts)
    return checked


def _rows(path: Path) -> Iterator[Any]:
    source = Source(path, path.parent)
    if not source.is_list:
        raise UserError(f"{path} must hold a list of records that is not empty")
    return source.rows()


def _text(value: Any, key: str) -> str:
    """A field that is text or a number, as text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{key!r} must be text, not {type(value).__name__}")
    check_unicode(str(value), repr(key))
    return str(value)


def _scored(record: Any, answer: str) -> tuple[str, list[str]]:
    """The right answer, and the options of a closed question."""
    given, choices = record.get("answer"), record.get("choices") or []
    if not isinstance(choices, list):
        raise UserError(f"'choices' must be a list, not {type(choices).__name__}")
    return answer if given is None else _text(given, "answer"), [_text(one, "choices") for one in choices]


def _first_exchange(conversation: Conversation) -> tuple[tuple[Turn, ...], str]:
    """The turns up to the first answer, and that answer."""
    turns = conversation.turns
    first = next(i for i, turn in enumerate(turns) if turn.role == "assistant")
    return turns[:first], turns[first].text


def encode_records(
    records: Sequence[HeldOutRecord], tokenizer: Tokenizer, recipe: Recipe, max_new_tokens: int
) -> list[Prompt]:
    """Return the prompt of each record, without pixels.

    Raises:
        RecipeError: a prompt with its longest answer is longer than a pack.
    """
    prompts, plan = [], plan_of(recipe.model)
    for record in records:
        try:
            runs = image_runs(plan, len(record.images), record.files)
            grids = image_grids(recipe.model, len(record.images), record.files)
        except ImageError as error:
            raise UserError(f"record {record.id}: {error}") from None
        tokens = encode_prompt(record.question, tokenizer, runs, recipe.data.system_message)
        needed = len(tokens) + max_new_tokens
        if needed > recipe.data.sequence_length:
            raise RecipeError(
                f"data.sequence_length: record {record.id} with its answer takes {needed} positions, a pack has "
                f"{recipe.data.sequence_length}; raise it (data.sequence_length=...), or lower --max-new-tokens"
            )
        prompts.append(Prompt(tokens, grids=grids))
    return prompts
