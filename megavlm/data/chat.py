"""ChatML: a conversation as token ids and labels, exactly as Qwen-VL's fine-tuning script does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megavlm.config.errors import UserError
from megavlm.data.batch import IGNORE_INDEX
from megavlm.data.schema import IMAGE_PLACEHOLDER, Conversation, Turn, check_text, check_unicode
from megavlm.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class EncodedSample:
    """A conversation as the model sees it, T positions."""

    tokens: NDArray[np.int64]
    """[T] token ids."""
    labels: NDArray[np.int64]
    """[T] the position's own token where it is trained on, else IGNORE_INDEX; not shifted."""
    num_images: int
    """Images whose slots are in ``tokens``."""


def encode_conversation(
    conversation: Conversation, tokenizer: Tokenizer, tokens_per_image: int, system_message: str
) -> EncodedSample:
    """Encode a conversation for training.

    System and user turns keep ``<|im_start|>``, ``<|im_end|>`` and the newline after it as labels; assistant
    turns keep these and their content, but not the role and its newline. Header, content and the newline at the
    end are encoded apart, so that the mask cuts between tokens.

    Args:
        conversation: A checked conversation.
        tokenizer: The tokenizer.
        tokens_per_image: ``<imgpad>`` slots of one image; ``<img>`` and ``</img>`` come on top.
        system_message: System turn for a conversation that has none; empty for none.

    Raises:
        UserError: A text contains control tokens of this tokenizer.
    """
    tokens: list[int] = []
    labels: list[int] = []
    for turn in _with_system(conversation.turns, system_message):
        header, content, end = _encode_turn(turn, tokenizer, tokens_per_image)
        tokens += header + content + end
        labels += [tokenizer.im_start_id] + [IGNORE_INDEX] * (len(header) - 1)
        labels += content if turn.role == "assistant" else [IGNORE_INDEX] * len(content)
        labels += end
    num_images = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in conversation.turns)
    return EncodedSample(np.asarray(tokens, np.int64), np.asarray(labels, np.int64), num_images)


def encode_prompt(
    turns: Sequence[Turn], tokenizer: Tokenizer, tokens_per_image: int, system_message: str
) -> NDArray[np.int64]:
    """Encode turns for generation: they end with ``<|im_start|>assistant`` and a newline.

    Args:
        turns: Earlier turns and the user's last one; images are :data:`IMAGE_PLACEHOLDER`.
        tokenizer: The tokenizer.
        tokens_per_image: ``<imgpad>`` slots of one image.
        system_message: System turn where ``turns`` have none; empty for none.

    Returns:
        [T] token ids.

    Raises:
        UserError: There are no turns, the last is not the user's, or a text contains control tokens.
    """
    if not turns or turns[-1].role != "user":
        raise UserError("a prompt must end with a user turn")
    tokens: list[int] = []
    for turn in _with_system(turns, system_message):
        check_text(turn.text, f"the {turn.role} turn")
        header, content, end = _encode_turn(turn, tokenizer, tokens_per_image)
        tokens += header + content + end
    tokens += turn_header("assistant", tokenizer)
    return np.asarray(tokens, np.int64)


def turn_header(role: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of ``<|im_start|>``, the role and a newline, with which a turn begins."""
    return [tokenizer.im_start_id, *tokenizer.encode(f"{role}\n")]


def last_question(prompt: Sequence[int], tokenizer: Tokenizer) -> str:
    """Text of the user's last turn in a prompt that :func:`encode_prompt` made, images as placeholders."""
    ids = [int(i) for i in prompt]
    starts = [position for position, i in enumerate(ids) if i == tokenizer.im_start_id]
    turn = ids[starts[-2] + len(turn_header("user", tokenizer)) : starts[-1]]
    parts: list[list[int]] = [[]]
    for i in turn[: turn.index(tokenizer.im_end_id)]:
        if i == tokenizer.img_start_id:
            parts.append([])
        elif i not in (tokenizer.imgpad_id, tokenizer.img_end_id):
            parts[-1].append(i)
    return IMAGE_PLACEHOLDER.join(tokenizer.decode(part) for part in parts)


def encode_text(text: str, tokenizer: Tokenizer, tokens_per_image: int) -> list[int]:
    """Token ids of plain text; each :data:`IMAGE_PLACEHOLDER` becomes ``<img>``, its slots and ``</img>``.

    Raises:
        UserError: The text contains a control token of this tokenizer, by whatever name the file calls it, or is not
            Unicode, on which tokenizers disagree: one raises, one writes other characters.
    """
    check_unicode(text)
    image = [tokenizer.img_start_id, *[tokenizer.imgpad_id] * tokens_per_image, tokenizer.img_end_id]
    ids: list[int] = []
    for index, part in enumerate(text.split(IMAGE_PLACEHOLDER)):
        encoded = tokenizer.encode(part) if part else []
        # Looked for among the ids: names differ between tokenizers, and some normalise the text first.
        forged = tokenizer.control_ids.intersection(encoded)
        if forged:
            raise UserError(f"text contains the control token {tokenizer.decode([min(forged)])}")
        ids += (image if index else []) + encoded
    return ids


def _with_system(turns: Sequence[Turn], system_message: str) -> list[Turn]:
    if system_message and (not turns or turns[0].role != "system"):
        return [Turn("system", system_message), *turns]
    return list(turns)


def _encode_turn(turn: Turn, tokenizer: Tokenizer, tokens_per_image: int) -> tuple[list[int], list[int], list[int]]:
    content = encode_text(turn.text, tokenizer, tokens_per_image)
    return turn_header(turn.role, tokenizer), content, [tokenizer.im_end_id, *tokenizer.encode("\n")]
