"""The keys of a conversation's record: what is used, what would be missing from the training, and what is only told.

Source of ``images`` and ``system`` beside the conversation: the ShareGPT form of github.com/hiyouga/LLaMA-Factory
(``data/README.md``), in which many sets for LLaVA and Qwen-VL are published.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from megavlm.data.formats.base import BrokenError, Record

_USED = frozenset({"id", "task", "conversations", "image", "images", "system"})
_SCORED = frozenset({"answer", "choices"})
"""Of held-out records, for ``megavlm eval``."""
_REFUSED = frozenset({
    "video", "videos", "audio", "audios",  # other media: the model would be trained blind
    "tools", "functions", "history", "messages", "chosen", "rejected", "kto_tag", "instruction", "input", "output",
})  # fmt: skip
"""What changes a conversation, and is not supported."""
_TURN_USED = frozenset({"from", "value"})
_TURN_REFUSED = frozenset({"image", "images", "video", "videos", "audio", "audios", "tool_calls"})
_TURN_TRAINED = frozenset({"weight", "loss", "train"})
"""Say of a turn whether it is trained on."""


def is_given(value: Any) -> bool:
    """Whether a key's value says anything."""
    return value not in (None, "", [], {}, False)


def picture_paths(entry: Record) -> list[str]:
    """Return the pictures beside a conversation: ``image`` is a path or a list, ``images`` a list (or a path).

    Raises:
        BrokenError: They are no paths, or the two keys differ.
    """
    found = [
        value if isinstance(value, list) else [value]
        for value in (entry.get("image"), entry.get("images"))
        if is_given(value)
    ]
    if len(found) == 2 and found[0] != found[1]:
        raise BrokenError("pictures do not match", "'image' and 'images' name different pictures")
    paths: list[Any] = found[0] if found else []
    for path in paths:
        if not isinstance(path, str) or not path.strip():
            raise BrokenError("bad record", "'image' (or 'images') must be a path, or a list of paths")
    return paths


def with_system(entry: Record, turns: list[Any]) -> list[Any]:
    """Return a record's turns with its ``system`` key as the first.

    Raises:
        BrokenError: It is no text, or the conversation has another system turn.
    """
    system = entry.get("system")
    if not is_given(system):
        return turns
    if not isinstance(system, str):
        raise BrokenError("bad record", f"'system' must be text, not {type(system).__name__}")
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    if first.get("from") != "system":
        return [{"from": "system", "value": system}, *turns]
    if first.get("value") != system:
        raise BrokenError("bad record", "the record has 'system' and another system turn; keep one")
    return turns


def check_keys(entry: Record, ignored: Counter[str]) -> None:
    """Refuse keys that change what would be trained; count in ``ignored`` those that nobody looks at.

    Raises:
        BrokenError: There is such a key.
    """
    unknown = set()
    for key, value in entry.items():
        if key in _USED or key in _SCORED or not is_given(value):
            continue
        if key in _REFUSED:
            raise BrokenError("unsupported key", f"{key!r} is not supported; leave the key out, or the record")
        unknown.add(key)
    turns = entry.get("conversations")
    for turn in turns if isinstance(turns, list) else ():
        unknown |= _unknown_in_turn(turn) if isinstance(turn, dict) else set()
    ignored.update(unknown)


def _unknown_in_turn(turn: Record) -> set[str]:
    unknown = set()
    for key, value in turn.items():
        if key in _TURN_USED:
            continue
        if key in _TURN_TRAINED:
            if value is not None and value != 1:  # True is 1
                raise BrokenError("unsupported key", f"{key!r} of a turn is not supported: all answers are trained on")
        elif key in _TURN_REFUSED and is_given(value):
            raise BrokenError("unsupported key", f"{key!r} of a turn is not supported; put it beside the conversation")
        elif is_given(value):
            unknown.add(f"{key} (of a turn)")
    return unknown
