"""Text that comes token by token is the text of the whole answer, and costs the same for each token."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tokenizer_files as files

from megavlm.data.chat import encode_prompt
from megavlm.data.schema import Turn
from megavlm.data.templates import find_template
from megavlm.data.tokenizer import load_tokenizer
from megavlm.inference.answer_text import AnswerText, answer_text

WRITERS: dict[str, Callable[[Path], Path]] = {
    "qwen": files.write_tiktoken,
    "qwen2": files.write_qwen2,
    "llava": files.write_llava,
    "llama": files.write_llama,
}
ANSWERS = [
    *files.TEXTS,
    "  The red mat\n\n\u4f60\u597d, \U0001f389\U0001f468\u200d\U0001f469 cafe\u0301!  ",
    "a " * 200,
]


@pytest.mark.parametrize("kind", list(WRITERS))
def test_pieces_add_up(kind: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(WRITERS[kind](tmp_path))
    rng = random.Random(1)
    answers = [tokenizer.encode(text) for text in ANSWERS]
    # Also what no text encodes to, but a model may say: any tokens, with ends that are a part of a character.
    answers += [[*ids[: len(ids) // 2], rng.choice(ids), *ids[len(ids) // 3 :]] for ids in answers if len(ids) > 3]
    answers += [ids[: rng.randrange(1, len(ids))] for ids in answers if len(ids) > 1]
    for ids in answers:
        text = AnswerText(tokenizer)
        pieces = [text.add(token) for token in ids]
        assert all("\ufffd" not in piece[-1:] for piece in pieces)
        rest = text.rest()
        assert "".join(pieces) + rest == tokenizer.decode(ids)
        assert text.rest() == ""


def test_a_token_costs_the_same_however_long_the_answer_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(files.write_qwen2(tmp_path))
    decode, lengths = tokenizer.decode, []

    def counted(ids: Sequence[int]) -> str:
        lengths.append(len(ids))
        return decode(ids)

    monkeypatch.setattr(tokenizer, "decode", counted)
    text = AnswerText(tokenizer)
    ids = tokenizer.encode("The red mat \u4f60\u597d \U0001f389 " * 100)
    said = "".join(text.add(token) for token in ids)
    assert len(ids) > 500 and said == decode(ids)
    assert len(lengths) <= 2 * len(ids) and max(lengths) <= 12


def test_what_a_token_would_add(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(files.write_llama(tmp_path))
    first, second = tokenizer.encode("the"), tokenizer.encode("the cat")
    text = AnswerText(tokenizer)
    text.add(first[0])
    following = second[len(first)]
    assert text.would_add(following) == text.add(following) != ""


def test_the_space_that_a_template_has_before_answers_is_no_part_of_them(tmp_path: Path) -> None:
    """As LLaVA, on a byte-level tokenizer: a later turn would have it twice."""
    tokenizer = load_tokenizer(files.write_qwen2(tmp_path), find_template("vicuna_v1_endoftext"))
    text = AnswerText(tokenizer)
    ids = tokenizer.encode(" Two cats.  ")
    assert "".join([*(text.add(token) for token in ids), text.rest()]) == "Two cats.  " == answer_text(ids, tokenizer)
    asked = [Turn("user", "a"), Turn("assistant", answer_text(ids, tokenizer)), Turn("user", "b")]
    prompt = encode_prompt(asked, tokenizer, [], "").tolist()
    first = encode_prompt(asked[:1], tokenizer, [], "").tolist()
    assert prompt[len(first) : len(first) + len(ids)] == ids
