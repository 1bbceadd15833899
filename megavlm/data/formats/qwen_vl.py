"""Qwen-VL's fine-tuning JSON: ``{"id", "conversations": [{"from", "value"}]}``, pictures as ``<img>path</img>``.

Source: ``finetune.py`` and the README of github.com/QwenLM/Qwen-VL. Records are passed on as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

from megavlm.data.formats.base import Broken, Record, identity
from megavlm.data.formats.llava import mentions_image, turns_of
from megavlm.data.formats.source import Source


def matches(source: Source) -> bool:
    """Whether turns contain ``<img>``, or there are conversations without any picture."""
    records = [record for record in source.head if isinstance(record.get("conversations"), list)]
    if any("<img>" in text for record in records for text in turns_of(record)):
        return True
    return bool(records) and not any(mentions_image(record) for record in records)


def read(source: Source) -> Iterator[Record | Broken]:
    """Yield the records.

    Raises:
        ValueError: The file holds no list.
    """
    for entry in source.rows():
        if isinstance(entry, dict) and mentions_image(entry) and entry.get("image") is not None:
            reason = "'image' beside the conversation is LLaVA's way; prepare it with --format llava"
            yield Broken(identity(entry, "id"), "pictures do not match", reason)
        else:
            yield entry
