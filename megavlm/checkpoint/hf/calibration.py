"""Samples of the user's data as a class of Transformers takes them, pictures included.

The processor and the chat template of the model's own directory write them, as a server does that serves it; of a model
that Transformers has no class for, tokenizer, tower and connector here (``own_calibration.py``).
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavlm.checkpoint.hf.transformers_class import first_line
from megavlm.config.errors import UserError
from megavlm.config.schema import DataConfig, DataSource
from megavlm.data.cache import located
from megavlm.data.images import ImageError, decode_with_pil
from megavlm.data.schema import IMAGE_PLACEHOLDER, Conversation, parse_conversation
from megavlm.data.shard_reader import DEFECT, open_shards

logger = logging.getLogger(__name__)

Inputs = dict[str, Tensor]
"""Of one sample: ``input_ids`` [1, S], ``attention_mask`` [1, S], and what the class calls its pictures."""
FEATURES = "features"
"""What a class made here calls them: [1, T, E] of the T image slots."""
_MOST_CAUSES = 5
"""Causes that are named of samples that are left out."""
_PICTURE = re.compile(r"(?:Picture \d+: ?)?" + re.escape(IMAGE_PLACEHOLDER) + r"\n?")


def calibration_samples(
    path: Path, images: Path | None, take: Callable[[dict[str, Any]], Inputs | str], *, count: int, longest: int,
    seed: int,
) -> list[Inputs]:  # fmt: skip
    """Return samples in the form that the model's class takes, drawn from all of the data.

    Args:
        path: prepared data, or what ``megavlm prepare`` reads.
        images: directory that the paths of plain data start from.
        take: returns what the class takes of a raw sample, or why it cannot be used.
        count: samples to return, if there are so many.
        longest: samples of more tokens are left out: half a sample would have half a picture.
        seed: of the order in which they are drawn.

    Raises:
        UserError: no sample can be used.
    """
    source = DataSource(path=str(path), images=None if images is None else str(images))
    reader = open_shards(located(source, DataConfig(train=(source,), sequence_length=longest)).path)
    order = list(range(len(reader)))
    random.Random(seed).shuffle(order)
    found: list[Inputs] = []
    left_out: Counter[str] = Counter()
    for position in order:
        if len(found) == count:
            break
        raw = reader[position]
        made = raw[DEFECT] if DEFECT in raw else take(raw)
        if isinstance(made, str):
            left_out[made] += 1
        elif made["input_ids"].shape[1] > longest:
            left_out[f"of more than {longest} tokens"] += 1
        else:
            found.append(made)
    causes = ", ".join(f"{number} {cause}" for cause, number in left_out.most_common(_MOST_CAUSES))
    if not found:
        raise UserError(f"--data {path}: none of its {len(reader)} samples can be used ({causes or 'it is empty'})")
    pictures = sum(not one.keys().isdisjoint(("pixel_values", FEATURES)) for one in found)
    logger.info("calibration: %d samples of %s, %d of them with pictures%s", len(found), path, pictures,
                f"; left out: {causes}" if causes else "")  # fmt: skip
    if len(found) < count:
        logger.warning("--samples %d: the data has no more than %d", count, len(found))
    return found


def by_processor(raw: dict[str, Any], processor: Any) -> Inputs | str:
    """Return what the class takes, or why the sample cannot be used.

    Args:
        raw: the sample's files.
        processor: of the model's directory.
    """
    try:
        conversation = parse_conversation(json.loads(raw["json"]))
        if conversation.films:
            return "with a film"
        # Opened as everywhere here: upright, on white.
        pictures = [decode_with_pil(raw[f"img{i}"]) for i in range(len(conversation.images))]
    except (UserError, ImageError, KeyError, ValueError) as error:
        return f"broken ({first_line(error)})"
    messages = list(_messages(conversation))
    begin = getattr(processor.tokenizer, "bos_token", None) or ""
    try:
        text = processor.apply_chat_template(messages, tokenize=False)
        # A template writes what begins a text itself, where it wants it.
        twice = {"add_special_tokens": False} if begin and text.startswith(begin) else {}
        made = processor(text=[text], images=pictures or None, return_tensors="pt", **twice)
    except Exception as error:  # of a foreign library: roles that the template refuses, pictures that are too narrow
        return f"that the model's template or processor refuses ({first_line(error)})"
    return {key: value for key, value in made.items() if isinstance(value, torch.Tensor)}


def _messages(conversation: Conversation) -> Iterator[dict[str, Any]]:
    """Yield the turns as chat templates take them, pictures where they stand."""
    for turn in conversation.turns:
        content: list[dict[str, str]] = []
        texts = _PICTURE.split(turn.text)
        for index, text in enumerate(texts):
            if text:
                content.append({"type": "text", "text": text})
            if index + 1 < len(texts):
                content.append({"type": "image"})
        yield {"role": turn.role, "content": content}
