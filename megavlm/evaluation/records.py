"""Held-out records: read, checked and turned into prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megavlm.config.errors import RecipeError
from megavlm.config.schema import Recipe
from megavlm.data.chat import encode_prompt
from megavlm.data.schema import IMAGE_PLACEHOLDER, Conversation, Turn, parse_conversation
from megavlm.data.tokenizer import Tokenizer
from megavlm.inference.prompt import Prompt


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


def read_records(path: Path, images: Path) -> list[HeldOutRecord]:
    """Return the records of a JSON file.

    Args:
        path: JSON list of Qwen-VL conversation records.
        images: directory of the images, which must all be there.

    Raises:
        FileNotFoundError: the file or an image is missing.
        ValueError: a record is wrong; the message has its index.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        records = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} must hold a list of records that is not empty")
    checked = []
    for index, record in enumerate(records):
        try:
            conversation = parse_conversation(record)
        except ValueError as error:
            raise ValueError(f"{path}: record {index}: {error}") from None
        question, answer = _first_exchange(conversation)
        shown = conversation.images[: sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in question)]
        for name in shown:
            if not (images / name).is_file():
                raise FileNotFoundError(f"{path}: record {index}: no image {name!r} in {images}")
        checked.append(
            HeldOutRecord(
                id=conversation.id or str(index),
                task=conversation.task or "all",
                question=question,
                answer=record.get("answer", answer),
                choices=record.get("choices") or [],
                images=[images / name for name in shown],
            )
        )
    return checked


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
    prompts = []
    for record in records:
        tokens = encode_prompt(record.question, tokenizer, recipe.model.tokens_per_image, recipe.data.system_message)
        needed = len(tokens) + max_new_tokens
        if needed > recipe.data.sequence_length:
            raise RecipeError(
                f"data.sequence_length: record {record.id} with its answer takes {needed} positions, a pack has "
                f"{recipe.data.sequence_length}; raise it (data.sequence_length=...), or lower --max-new-tokens"
            )
        prompts.append(Prompt(tokens))
    return prompts
