"""The ids of special tokens stand in up to four files of one directory: all are read, and they must agree.

The facts are those of Transformers: ``added_tokens.json`` (older versions) and ``added_tokens_decoder`` of
``tokenizer_config.json`` (newer ones) give ids to tokens that the model's file lacks, and what
``special_tokens_map.json`` or ``tokenizer_config.json`` name without an id anywhere is appended, in a fixed order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megavlm.config.errors import UserError
from megavlm.config.json_object import read_json

ID_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files that say ids beside a tokenizer's own."""

_DECODER = "added_tokens_decoder"
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
# Pieces that were left free for later; giving one a name is no disagreement (InternLM2 does).
_FREE_PIECE = re.compile(r"unused|reserved", re.IGNORECASE)


def tokens_beside(path: Path, known: Mapping[str, int]) -> dict[str, int]:
    """Return the tokens that the files beside a tokenizer's file give ids to, those that it has itself included.

    Args:
        path: the tokenizer's file.
        known: its own tokens and their ids.

    Raises:
        UserError: a file is broken, or two places disagree; both are named.
    """
    directory, ids, places = path.parent, dict(known), dict.fromkeys(known, path.name)
    names = {number: token for token, number in known.items()}
    found: dict[str, int] = {}
    for place, tokens in _places(directory, path):
        for token, number in tokens.items():
            where = f"tokenizer {directory / place.split(' ')[0]}"
            if ids.get(token, number) != number:
                raise UserError(
                    f"{where}: {token} has the id {number} in {place}, but {places[token]} says {ids[token]}; "
                    "correct one"
                )
            other = names.get(number, token)
            if other != token and not (other in known and _FREE_PIECE.search(other)):
                raise UserError(
                    f"{where}: {token} has the id {number} in {place}, but {places[other]} says that this is {other}; "
                    "correct one"
                )
            ids[token], names[number] = number, token
            places.setdefault(token, place)
            found[token] = number
    after = max(ids.values(), default=-1) + 1
    for token in _named(directory):
        if token not in ids:
            ids[token] = found[token] = after
            after += 1
    return found


def _places(directory: Path, path: Path) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield each place with ids, and what it says."""
    added = directory / "added_tokens.json"
    if added.is_file():
        tokens = read_json(added)
        if not all(token and type(number) is int and number >= 0 for token, number in tokens.items()):
            raise UserError(f"tokenizer {added} must be an object of tokens and their ids")
        yield added.name, tokens
    config = directory / "tokenizer_config.json"
    if config.is_file():
        decoder = read_json(config).get(_DECODER) or {}
        try:
            tokens = {entry["content"]: int(number) for number, entry in decoder.items()}
            if len(tokens) != len(decoder) or not all(isinstance(token, str) and token for token in tokens):
                raise TypeError
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"tokenizer {config}: {_DECODER} must be an object of ids and their tokens") from None
        yield f"{config.name} ({_DECODER})", tokens
    whole = directory / "tokenizer.json"
    if whole.is_file() and whole != path:
        try:
            entries = read_json(whole).get("added_tokens") or ()
            yield f"{whole.name} (added_tokens)", {entry["content"]: entry["id"] for entry in entries}
        except (AttributeError, KeyError, TypeError):
            raise UserError(f"tokenizer {whole} is not a tokenizer.json") from None


def _named(directory: Path) -> Iterator[str]:
    """Yield the special tokens that are named, in the order in which Transformers appends those without an id."""
    settings: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = directory / name
        if path.is_file():
            settings |= {key: value for key, value in read_json(path).items() if value is not None}
    for key in (*_NAMES, *_LISTS):
        value = settings.get(key)
        values = [value]
        if key in _LISTS and value is not None:
            if not isinstance(value, dict | list):
                raise UserError(f"tokenizer {directory}: {key} is {str(value)[:40]!r}; it must be a list of tokens")
            values = list(value.values()) if isinstance(value, dict) else value
        for one in values:
            token = one.get("content") if isinstance(one, dict) else one
            if isinstance(token, str) and token:
                yield token
