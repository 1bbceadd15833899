"""Every key of a recipe, read off the typed tree: for help, for error messages and for the frozen list of keys."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

from megavlm.config.schema import Recipe

INDEX = "<i>"
"""Stands for the position in a list, as in ``data.train.<i>.path``."""

_TYPE_NAMES = {int: "integer", float: "number", bool: "true or false", str: "text"}
_BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


@dataclass(frozen=True)
class Key:
    """One key, or one branch of keys."""

    path: str
    """Dotted, with INDEX for list positions."""
    type: str
    """The type in words, with bounds or choices."""
    meaning: str
    required: bool
    """Whether it has no default of its own (a preset may still give one)."""
    default: Any
    branch: bool
    """Whether other keys lie under it."""


@functools.cache
def all_keys() -> tuple[Key, ...]:
    """Return every branch and key, in the order of the schema."""
    return tuple(_walk(Recipe, ""))


def leaf_keys() -> list[Key]:
    """Return the keys that take a value."""
    return [key for key in all_keys() if not key.branch]


def find_key(path: str) -> Key | None:
    """Return the key called ``path``, where list positions may be numbers or INDEX."""
    generic = ".".join(INDEX if part.isdigit() else part for part in path.split("."))
    return next((key for key in all_keys() if key.path == generic), None)


def _walk(owner: type, prefix: str) -> typing.Iterator[Key]:
    for name, info in owner.__pydantic_fields__.items():  # type: ignore[attr-defined]
        path = f"{prefix}{name}"
        child, listed = _child(info.annotation)
        default = None if info.is_required() or info.default_factory is not None else info.default
        kind = _type_text(info.annotation, info.metadata)
        yield Key(path, kind, info.description or "", info.is_required(), default, child is not None)
        if child is not None:
            yield from _walk(child, f"{path}.{INDEX}." if listed else f"{path}.")


def _child(annotation: Any) -> tuple[type | None, bool]:
    """Return the dataclass that ``annotation`` holds, and whether it is a list of them."""
    if typing.get_origin(annotation) is tuple and dataclasses.is_dataclass(typing.get_args(annotation)[0]):
        return typing.get_args(annotation)[0], True
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return annotation, False
    return None, False


def _type_text(annotation: Any, metadata: list[Any]) -> str:
    if typing.get_origin(annotation) is tuple:
        return "list" if _child(annotation)[1] else _list_text(annotation)
    if dataclasses.is_dataclass(annotation):
        return "branch"
    options = [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        options = list(typing.get_args(annotation))
    words: list[str] = []
    for option in options:
        if option is types.NoneType:
            continue
        if typing.get_origin(option) is Literal:
            words.append(" | ".join(typing.get_args(option)))
        elif typing.get_origin(option) is tuple:
            words.append(("or " if words else "") + _list_text(option))
        else:
            words.append(_TYPE_NAMES[option])
    for attribute, sign in _BOUNDS:
        words += [f"{sign} {bound:g}" for item in metadata if (bound := getattr(item, attribute, None)) is not None]
    return " ".join(words) + (" or null" if types.NoneType in options else "")


def _list_text(annotation: Any) -> str:
    """Return how a list of values is called: of a fixed length, or of any."""
    values = typing.get_args(annotation)
    if typing.get_origin(values[0]) is tuple:
        return "list of lists"
    return f"list of {_TYPE_NAMES[values[0]]}s" if values[-1] is Ellipsis else f"list of {len(values)}"
