"""The recipe shown to users: every key with its meaning, and a resolved recipe as YAML."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from typing import Any

from megavlm.config import yaml12
from megavlm.config.keys import INDEX, Key, all_keys
from megavlm.config.schema import ModelConfig, Recipe

_MAX_WIDTH = 110
_MIN_WIDTH = 60
_WIDE = 45
"""Least columns for the text beside the keys; where there are fewer it goes below them."""


def keys_help(width: int | None = None) -> str:
    """Return the help text of every key, grouped by branch.

    Args:
        width: Columns to fill; None for those of the terminal.
    """
    columns = width or min(shutil.get_terminal_size().columns, _MAX_WIDTH)
    keys = all_keys()
    column = max(len(key.path) for key in keys if not key.branch) + 4
    lines = [f"Keys of a recipe, to be set in its YAML file or as key=value ({INDEX} is a position in a list, from 0):"]
    for branch in ["", *(key.path for key in keys if key.branch)]:
        leaves = [key for key in keys if not key.branch and _parent(key) == branch]
        title = next((key.meaning for key in keys if key.path == branch), "The run.")
        if leaves or branch.count(".") == 0:
            lines += ["", f"{branch or 'recipe'}: {title}"]
        for key in leaves:
            lines += _entry(key, column, max(columns, _MIN_WIDTH))
    return "\n".join(lines)


def _entry(key: Key, column: int, width: int) -> list[str]:
    kind = f"{key.type}; {_default(key)}" + ("" if key.shared else f"; of {', '.join(key.owners)}")
    wide = width - column >= _WIDE
    indent = " " * (column if wide else 6)
    text = [
        line
        for part in (kind, key.meaning)
        for line in textwrap.wrap(part, width - len(indent), break_on_hyphens=False)
    ]
    head = f"  {key.path}".ljust(column)
    if wide:
        return [head + text[0], *(indent + line for line in text[1:])]
    return [head.rstrip(), *(indent + line for line in text)]


def _default(key: Key) -> str:
    if key.required:
        from_preset = key.path.startswith("model.") and not key.path.endswith(".preset")
        return "default from the preset" if from_preset else "required"
    if isinstance(key.default, float):
        return f"default {key.default:g}"
    if isinstance(key.default, tuple):
        return f"default [{', '.join(repr(value) for value in key.default)}]"
    return f"default {yaml12.dump(key.default).removesuffix('...' + chr(10)).strip()}"


def _parent(key: Key) -> str:
    """Return the branch that ``key`` lies in, without a list position."""
    return key.path.rpartition(".")[0].removesuffix(f".{INDEX}")


def to_yaml(recipe: Recipe) -> str:
    """Return ``recipe`` as YAML, with every key; loading it gives an equal recipe."""
    return yaml12.dump(to_tree(recipe))


def to_tree(recipe: Recipe | ModelConfig) -> dict[str, Any]:
    """Return ``recipe``, or a model, as plain dictionaries and lists, as a checkpoint carries it."""
    tree: dict[str, Any] = _plain(dataclasses.asdict(recipe))
    return tree


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
