"""Qwen-VL's fine-tuning JSON: ``{"id", "conversations": [{"from", "value"}]}``, pictures as ``<img>path</img>``.

Source: ``finetune.py`` and the README of github.com/QwenLM/Qwen-VL. Records are passed on as they are, but for a
``system`` key beside the conversation, which becomes its first turn (:mod:`megavlm.data.formats.keys`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from megavlm.data.formats.base import Broken, BrokenError, Record, identity
from megavlm.data.formats.keys import check_keys, has_roles, is_given, with_system
from megavlm.data.formats.llava import convert_one, mentions_image, turns_of
from megavlm.data.formats.source import Source

_BESIDE = ("image", "images", "video", "videos", "system")


def matches(source: Source) -> bool:
    """Whether turns contain ``<img>``, or there are conversations without any picture."""
    records = [
        record for record in source.head if isinstance(record.get("conversations"), list) and not has_roles(record)
    ]
    if any("<img>" in text for record in records for text in turns_of(record)):
        return True
    return bool(records) and not any(mentions_image(record) for record in records)


def read(source: Source) -> Iterator[Record | Broken]:
    """Yield the records.

    Raises:
        UserError: The file holds no list.
    """
    for entry in source.rows():
        try:
            yield _own(entry, source.ignored) if isinstance(entry, dict) else entry
        except BrokenError as error:
            yield error.about(identity(entry, "id"))


def conversation(entry: Any, ignored: Counter[str]) -> Any:
    """Return one record in this form, whether it is written in this form or in LLaVA's; what is no object, as it is.

    Raises:
        BrokenError: It cannot be one.
    """
    if not isinstance(entry, dict):
        return entry
    if mentions_image(entry) and not any("<img>" in text for text in turns_of(entry)):
        return _without(entry, *_BESIDE) | convert_one(entry, ignored)
    return _own(entry, ignored)


def _own(entry: Record, ignored: Counter[str]) -> Record:
    beside = [key for key in ("image", "images", "video", "videos") if is_given(entry.get(key))]
    if beside:
        key = beside[0]
        reason = f"{key!r} beside the conversation is LLaVA's way; prepare it with --format llava"
        raise BrokenError("pictures do not match", reason)
    check_keys(entry, ignored)
    turns = entry.get("conversations")
    if not isinstance(turns, list) or not turns:
        return entry
    return _without(entry, *_BESIDE) | {"conversations": with_system(entry, turns)}


def _without(entry: Record, *keys: str) -> Record:
    return {key: value for key, value in entry.items() if key not in keys}
