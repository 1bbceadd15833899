"""Questions as the model gets them: token ids of prompts and of options; what cannot be asked is set aside."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megavlm.config.errors import RecipeError, UserError
from megavlm.config.schema import Recipe
from megavlm.data.chat import count_images, encode_prompt, encode_text
from megavlm.data.films.film import Film
from megavlm.data.images import image_grids, image_runs
from megavlm.data.media import TokenGrid, plan_of
from megavlm.data.schema import Turn, check_text
from megavlm.data.tokenizer import Tokenizer
from megavlm.evaluation.benchmarks.spec import LETTERS, Benchmark, Item, Shown, render, shown_data


@dataclass(frozen=True)
class Question:
    """An item with its prompt."""

    item: Item
    text: str
    """The prompt; pictures are placeholders."""
    tokens: NDArray[np.int64]
    """[T] token ids."""
    options: tuple[tuple[int, ...], ...]
    """Token ids of each option's letter; empty for a question that is generated."""
    problem: str = ""
    """Why it cannot be asked; it then counts as wrong."""
    grids: tuple[TokenGrid, ...] = ()
    """See :class:`megavlm.inference.prompt.Prompt`."""


def make_questions(
    benchmark: Benchmark, items: Sequence[Item], tokenizer: Tokenizer, recipe: Recipe, max_new_tokens: int, chat: bool
) -> list[Question]:
    """Return the questions of a benchmark.

    A question whose text has a control token (it would forge turns or pictures) is kept with its ``problem``.

    Raises:
        UserError: a prompt shows more or fewer pictures than its question has.
        RecipeError: prompts with their longest answers are longer than a pack.
    """
    # After "Answer:" the letter comes with its space, as in Qwen-VL's evaluation; a turn begins with the letter.
    letters = [_said(letter, tokenizer) if chat else tuple(tokenizer.encode(f" {letter}")) for letter in LETTERS]
    questions = []
    for item in items:
        text = render(benchmark, item)
        options = tuple(letters[: len(item.choices)])
        grids: tuple[TokenGrid, ...] = ()
        try:
            tokens, problem = _encode(text, item, tokenizer, recipe, chat), ""
            grids = image_grids(recipe.model, len(item.pictures), partial(_files, item))
        except UserError as error:
            tokens, problem = np.zeros(0, np.int64), str(error)
        questions.append(Question(item, text, tokens, options, problem, grids))
    check_lengths(questions, max_new_tokens, recipe.data.sequence_length)
    return questions


def _said(letter: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids of a letter as an answer's beginning."""
    template = tokenizer.template
    if not template.joined or not template.answer_prefix:
        return tuple(tokenizer.encode(letter))
    # With its space, as it stands behind what leads to an answer: some tokenizers begin text with one of their own.
    lead = template.lead[-1] if template.lead else "\n"
    known, whole = (tokenizer.encode(lead + said) for said in ("", template.answer_prefix + letter))
    return tuple(whole[len(known) :]) if whole[: len(known)] == known else tuple(tokenizer.encode(letter))


def _files(item: Item) -> list[bytes | Film]:
    return [shown_data(one) for one in item.pictures]


def _encode(text: str, item: Item, tokenizer: Tokenizer, recipe: Recipe, chat: bool) -> NDArray[np.int64]:
    turns = [Turn("user", text)]
    runs = image_runs(plan_of(recipe.model), count_images(turns), partial(_files, item))
    if chat:
        return encode_prompt(turns, tokenizer, runs, recipe.data.system_message)
    check_text(text, "the question")
    begin = [tokenizer.ids.get(piece) for piece in tokenizer.template.begin]
    return np.asarray([*(i for i in begin if i is not None), *encode_text(text, tokenizer, runs)], np.int64)


def check_lengths(questions: Sequence[Question], max_new_tokens: int, capacity: int) -> None:
    """Check that each question with its longest answer fits into a pack.

    Raises:
        RecipeError: some do not.
    """
    needed = [
        len(one.tokens) + (max(map(len, one.options)) - 1 if one.options else max_new_tokens) for one in questions
    ]
    too_long = sum(length > capacity for length in needed)
    if too_long:
        longest = max(range(len(needed)), key=needed.__getitem__)
        raise RecipeError(
            f"data.sequence_length: {too_long} of {len(needed)} questions do not fit: question "
            f"{questions[longest].item.id} with its answer takes {needed[longest]} positions, a pack has {capacity}; "
            f"raise it (data.sequence_length=...)"
        )


def _name_of(picture: Shown) -> str:
    """Return which picture or film it is: a digest, a path, or the address of one that is fetched."""
    if isinstance(picture, bytes):
        return hashlib.sha256(picture).hexdigest()
    return str(picture) if isinstance(picture, Path) else str(picture.name)


def digest(questions: Sequence[Question]) -> str:
    """Return a short digest of all prompts, by which predictions are told from those of other questions.

    The tokens have all that is asked: system message, earlier turns, the places of pictures.
    """
    total = hashlib.sha256()
    for one in questions:
        pictures = [_name_of(picture) for picture in one.item.pictures]
        total.update(json.dumps([one.item.id, one.text, pictures, len(one.options)]).encode())
        total.update(one.tokens.tobytes())
    return total.hexdigest()[:12]
