"""Every key of a recipe, read off the typed tree: for help, for error messages and for the frozen list of keys."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megavlm.config.architecture import BRANCHES, Branch, load
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
    owners: tuple[str, ...] = ()
    """Of a key of ``model``'s branches: the architectures that have it."""
    shared: bool = True
    """Whether all architectures of its branch have it."""


@functools.cache
def all_keys() -> tuple[Key, ...]:
    """Return every branch and key, in the order of the schema."""
    return tuple(_walk(Recipe, ""))


def leaf_keys() -> list[Key]:
    """Return the keys that take a value."""
    return [key for key in all_keys() if not key.branch]


def find_key(path: str, owner: str | None = None) -> Key | None:
    """Return the key called ``path``, where list positions may be numbers or INDEX.

    Args:
        path: dotted.
        owner: the architecture whose key it is; the first one that has it where that is None, or has it not.
    """
    generic = ".".join(INDEX if part.isdigit() else part for part in path.split("."))
    found = [key for key in all_keys() if key.path == generic]
    return next((key for key in found if owner in key.owners), found[0] if found else None)


def _walk(owner: type, prefix: str) -> Iterator[Key]:
    for name, info in owner.__pydantic_fields__.items():  # type: ignore[attr-defined]
        path = f"{prefix}{name}"
        child, listed = _child(info.annotation)
        yield _key(path, info, _meaning(owner, name), branch=child is not None)
        if any(isinstance(item, Branch) for item in info.metadata):
            yield from _of_architectures(name, f"{path}.")
        elif child is not None:
            yield from _walk(child, f"{path}.{INDEX}." if listed else f"{path}.")


def _meaning(owner: Any, name: str) -> str:
    """Return the text under a field: of the class itself, or of the one that it has it from."""
    classes = [one for one in owner.__mro__ if name in getattr(one, "__pydantic_fields__", ())]
    texts = [one.__pydantic_fields__[name].description for one in classes]
    return next((text for text in texts if text), "")


def _key(path: str, info: Any, meaning: str, *, branch: bool) -> Key:
    default = None if info.is_required() or info.default_factory is not None else info.default
    kind = _type_text(info.annotation, info.metadata)
    return Key(path, kind, meaning, info.is_required(), default, branch)


def _of_architectures(branch: str, prefix: str) -> Iterator[Key]:
    """Yield the keys of all architectures of a branch of ``model``; those that mean the same to several, once."""
    load()
    found: dict[Key, list[str]] = {}
    architectures = BRANCHES[branch].architectures()
    for architecture in architectures:
        for name, info in architecture.config.__pydantic_fields__.items():
            key = _key(f"{prefix}{name}", info, _meaning(architecture.config, name), branch=False)
            found.setdefault(key, []).append(architecture.name)
    for key, owners in found.items():
        yield dataclasses.replace(key, owners=tuple(owners), shared=len(owners) == len(architectures))


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
            words.append(("or " if words else "") + _TYPE_NAMES[option])
    for attribute, sign in _BOUNDS:
        words += [f"{sign} {bound:g}" for item in metadata if (bound := getattr(item, attribute, None)) is not None]
    return " ".join(words) + (" or null" if types.NoneType in options else "")


def _list_text(annotation: Any) -> str:
    """Return how a list of values is called: of a fixed length, or of any."""
    values = typing.get_args(annotation)
    if typing.get_origin(values[0]) is tuple:
        return "list of lists"
    return f"list of {_TYPE_NAMES[values[0]]}s" if values[-1] is Ellipsis else f"list of {len(values)}"
