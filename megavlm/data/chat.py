"""ChatML: a conversation as token ids and labels, exactly as Qwen-VL's fine-tuning script does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megavlm.data.batch import IGNORE_INDEX
from megavlm.data.schema import IMAGE_PLACEHOLDER, Conversation, Turn, check_text
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
    turns keep these and their content, but not the role and its newline.

    Args:
        conversation: A checked conversation.
        tokenizer: The tokenizer.
        tokens_per_image: ``<imgpad>`` slots of one image; ``<img>`` and ``</img>`` come on top.
        system_message: System turn for a conversation that has none; empty for none.
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
        ValueError: There are no turns, the last is not the user's, or a text contains control tokens.
    """
    if not turns or turns[-1].role != "user":
        raise ValueError("a prompt must end with a user turn")
    tokens: list[int] = []
    for turn in _with_system(turns, system_message):
        check_text(turn.text, f"the {turn.role} turn")
        header, content, end = _encode_turn(turn, tokenizer, tokens_per_image)
        tokens += header + content + end
    tokens += [tokenizer.im_start_id, *tokenizer.encode("assistant"), *tokenizer.encode("\n")]
    return np.asarray(tokens, np.int64)


def encode_text(text: str, tokenizer: Tokenizer, tokens_per_image: int) -> list[int]:
    """Token ids of plain text; each :data:`IMAGE_PLACEHOLDER` becomes ``<img>``, its slots and ``</img>``."""
    image = [tokenizer.img_start_id, *[tokenizer.imgpad_id] * tokens_per_image, tokenizer.img_end_id]
    ids: list[int] = []
    for index, part in enumerate(text.split(IMAGE_PLACEHOLDER)):
        ids += (image if index else []) + (tokenizer.encode(part) if part else [])
    return ids


def _with_system(turns: Sequence[Turn], system_message: str) -> list[Turn]:
    if system_message and (not turns or turns[0].role != "system"):
        return [Turn("system", system_message), *turns]
    return list(turns)


def _encode_turn(turn: Turn, tokenizer: Tokenizer, tokens_per_image: int) -> tuple[list[int], list[int], list[int]]:
    newline = tokenizer.encode("\n")
    header = [tokenizer.im_start_id, *tokenizer.encode(turn.role), *newline]
    content = encode_text(turn.text, tokenizer, tokens_per_image)
    return header, content, [tokenizer.im_end_id, *newline]
