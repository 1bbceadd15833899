"""The keys of a conversation's record: what is used, what would be missing from the training, and what is only told.

Source of ``images`` and ``system`` beside the conversation: the ShareGPT form of github.com/hiyouga/LLaMA-Factory
(``data/README.md``), in which many sets for LLaVA and Qwen-VL are published.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from megavlm.config.errors import UserError
from megavlm.data.formats.base import BrokenError, Record
from megavlm.data.schema import WEIGHT_KEYS, turn_weight

_USED = frozenset({"id", "task", "conversations", "image", "images", "video", "videos", "system"})
SCORED = ("answer", "answers", "choices", "metric")
"""Of held-out records, for ``megavlm eval``."""
_REFUSED = frozenset({
    "audio", "audios",  # other media: the model would be trained deaf
    "tools", "functions", "history", "messages", "instruction", "input", "output", "query", "response",
    # Preferences, and boxes that stand apart: what is to be trained is not the conversation alone.
    "chosen", "rejected", "kto_tag", "rejected_response", "rejected_messages", "rejected_images", "preferred_output",
    "non_preferred_output", "objects",
})  # fmt: skip
"""What changes a conversation, and is not supported."""
_LIKED = frozenset({"kto_tag", "label"})
"""True or false: KTO's mark of a good answer, in LLaMA-Factory and ms-swift."""
_WEIGHTS = frozenset({*WEIGHT_KEYS, "loss_scale"})
"""Say how much is trained on. Of a turn the first three are used."""
_TURN_USED = frozenset({"from", "value", *WEIGHT_KEYS})
_TURN_REFUSED = frozenset({
    "image", "images", "video", "videos", "audio", "audios", "tool_calls", "function_call", "refusal",
    "reasoning_content", "thinking", "train_detail", "training_detail", "loss_scale",
})  # fmt: skip


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
        if key in _WEIGHTS and value is not None and value != 1:  # True is 1
            raise BrokenError("unsupported key", f"{key!r} of a record is not supported; give its answers a weight")
        if key in _LIKED and isinstance(value, bool):
            raise BrokenError("unsupported key", f"{key!r} says whether an answer is liked, which is not trained on")
        if key in _USED or key in SCORED or key in _WEIGHTS or not is_given(value):
            continue
        if key in _REFUSED:
            raise BrokenError("unsupported key", f"{key!r} is not supported; leave the key out, or the record")
        unknown.add(key)
    turns = entry.get("conversations")
    for index, turn in enumerate(turns if isinstance(turns, list) else ()):
        unknown |= _unknown_in_turn(turn, index) if isinstance(turn, dict) else set()
    ignored.update(unknown)


def _unknown_in_turn(turn: Record, index: int) -> set[str]:
    try:
        turn_weight(turn, f"turn {index}", answer=turn.get("from") in ("gpt", "assistant"))
    except UserError as error:
        raise BrokenError("bad weight", str(error)) from None
    unknown = set()
    for key, value in turn.items():
        if key in _TURN_USED or not is_given(value):
            continue
        if key in _TURN_REFUSED:
            where = "; put it beside the conversation" if key in ("image", "images", "video", "videos") else ""
            raise BrokenError("unsupported key", f"{key!r} of a turn is not supported{where}")
        unknown.add(f"{key} (of a turn)")
    return unknown


def weights_of(turn: Record) -> Record:
    """Return the keys of a turn that say how much it counts."""
    return {key: turn[key] for key in WEIGHT_KEYS if turn.get(key) is not None}


def has_roles(entry: Record) -> bool:
    """Whether the turns of ``conversations`` are ``role`` and ``content``, as those of messages are."""
    turns = entry.get("conversations")
    first = turns[0] if isinstance(turns, list) and turns else None
    return isinstance(first, dict) and "role" in first and "from" not in first
