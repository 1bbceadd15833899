"""Qwen-VL's fine-tuning JSON: ``{"id", "conversations": [{"from", "value"}]}``, pictures as ``<img>path</img>``.

Source: ``finetune.py`` and the README of github.com/QwenLM/Qwen-VL. Records are passed on as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

from megavlm.data.formats.base import Broken, Record, Source
from megavlm.data.formats.llava import mentions_image, turns_of


def matches(source: Source) -> bool:
    """Whether turns contain ``<img>``, or there are conversations without any picture."""
    records = [record for record in source.objects if isinstance(record.get("conversations"), list)]
    if any("<img>" in text for record in records for text in turns_of(record)):
        return True
    return bool(records) and not any(mentions_image(record) for record in records)


def read(source: Source) -> Iterator[Record | Broken]:
    """Yield the records.

    Raises:
        ValueError: The file holds no list.
    """
    if not isinstance(source.content, list):
        raise ValueError(f"{source.path} must hold a list of records that is not empty")
    yield from source.content
