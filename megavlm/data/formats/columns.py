"""LLaMA-Factory's ``dataset_info.json`` beside a data file: what its columns and the keys of its turns are called.

Source (facts): ``data/README.md`` of github.com/hiyouga/LLaMA-Factory. An entry names a ``file_name`` of its folder,
``formatting`` (alpaca, the default, or sharegpt), ``columns`` and ``tags``. Records are renamed to the names that the
formats here know, ``from``, ``value``, ``human`` and ``gpt`` among them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.config.errors import UserError
from megavlm.data.formats.encoding import not_unicode, open_text

FILE = "dataset_info.json"
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_SHAREGPT = {"messages": "conversations"}
_OTHER = ("history", "system", "tools", "images", "videos", "audios", "chosen", "rejected", "kto_tag")
_KEY_TAGS = {"role_tag": "from", "content_tag": "value"}
_ROLE_TAGS = {"user_tag": "human", "assistant_tag": "gpt", "system_tag": "system",
              "observation_tag": "observation", "function_tag": "function_call"}  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """How records are renamed."""

    keys: Mapping[str, str]
    """Of a record: ours by theirs."""
    turn_keys: Mapping[str, str]
    roles: Mapping[str, str]

    def apply(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return a record under the names that are known here; what it holds beside is as it was."""
        found = _renamed(record, self.keys)
        turns = found.get("conversations")
        if not isinstance(turns, list) or not self.turn_keys:
            return found
        return found | {"conversations": [self._turn(turn) if isinstance(turn, dict) else turn for turn in turns]}

    def _turn(self, turn: dict[str, Any]) -> dict[str, Any]:
        found = _renamed(turn, self.turn_keys)
        role = found.get("from")
        return found | ({"from": self.roles[role]} if isinstance(role, str) and role in self.roles else {})


def _renamed(given: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Rename keys; one that has a name by itself which another gets is not what the description means, and goes."""
    taken = {names[key] for key in given if key in names}
    return {names.get(key, key): value for key, value in given.items() if key in names or key not in taken}


def described(path: Path) -> Columns | None:
    """Return how the records of a file are renamed; None where no ``dataset_info.json`` beside it names the file.

    Raises:
        UserError: Two entries say different things of it, or one says what is not supported.
    """
    file = path.absolute().parent / FILE
    if not file.is_file() or path.name == FILE:
        return None
    try:
        with open_text(file) as text:
            content = json.load(text)
    except UnicodeDecodeError:
        raise not_unicode(file) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}; mend it, or move it away from {path.name}") from None
    entries = {
        name: entry
        for name, entry in (content.items() if isinstance(content, dict) else ())
        if isinstance(entry, dict) and entry.get("file_name") == path.name
    }
    found = {name: _columns(f"{file}: {name}", entry) for name, entry in entries.items()}
    if len({repr(one) for one in found.values()}) > 1:
        raise UserError(f"{file}: {' and '.join(found)} say different things of {path.name}; keep one of them")
    return next(iter(found.values()), None)


def _columns(where: str, entry: Mapping[str, Any]) -> Columns:
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt"):
        raise UserError(f"{where}: formatting {formatting!r} is not supported; alpaca or sharegpt")
    if entry.get("ranking"):
        raise UserError(f"{where}: ranking: true is a set of preferences, which is not trained on here")
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    if not all(isinstance(one, dict) and all(isinstance(v, str) for v in one.values()) for one in (columns, tags)):
        raise UserError(f"{where}: columns and tags must be objects of names")
    known = {**(_ALPACA if formatting == "alpaca" else _SHAREGPT), **{name: name for name in _OTHER}}
    strange = [*(columns.keys() - {*known, *_ALPACA, *_SHAREGPT}), *(tags.keys() - {*_KEY_TAGS, *_ROLE_TAGS})]
    if strange:
        raise UserError(f"{where}: {sorted(strange)[0]!r} is no column or tag that is known here")
    keys = {theirs: known[ours] for ours, theirs in columns.items() if ours in known and known[ours] != theirs}
    if formatting == "alpaca":
        return Columns(keys, {}, {})
    turn_keys = {tags.get(tag, ours): ours for tag, ours in _KEY_TAGS.items()}
    roles = {tags.get(tag, ours): ours for tag, ours in _ROLE_TAGS.items()}
    return Columns(keys, turn_keys, roles)
