"""YAML as recipes use it: the plain types of YAML 1.2, duplicate keys refused.

PyYAML follows YAML 1.1, where ``1e-4`` is text, ``no`` is false, ``010`` is eight and ``1:30`` is ninety. Here
a number looks like a number of Python, only ``true`` and ``false`` are booleans, and dates stay text.
The writer quotes what either version would misread, so that other readers understand it too.

A recipe may come with a stranger's checkpoint, so what a file becomes is bounded before it is built: its text, its
values with every alias written out (ten lines of aliases of aliases are 10^10 values), and each whole number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from typing import Any

import yaml

from megavlm.config.errors import UserError

MOST_TEXT = 4 << 20
"""Characters of a file: some 20,000 data sets, each with five keys."""
MOST_VALUES = 250_000
"""Keys and values, those that aliases and merge keys repeat included."""
MOST_DEPTH = 100
"""Branches inside branches."""
_LARGEST_INTEGER = 2**63 - 1

_NULL, _BOOL, _INT, _FLOAT, _MERGE = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "merge"))

_RULES: tuple[tuple[str, str, str], ...] = (
    (_NULL, r"~|null|Null|NULL|", "~nN\0"),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (_INT, r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    (
        _FLOAT,
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    (_MERGE, r"<<", "<"),
)


class _Loader(yaml.SafeLoader):
    """The safe loader with the rules above."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own class attribute)

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._sizes: dict[yaml.Node, int] = {}  # of what has an anchor, with its own aliases written out
        self._values = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Count what is composed, an alias as all that it stands for, before any of it is built."""
        event = self.peek_event()
        mark, before = event.start_mark, self._values
        if self._depth >= MOST_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"more than {MOST_DEPTH} branches inside each other", problem_mark=mark)
        alias = isinstance(event, yaml.AliasEvent)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None or (alias and node not in self._sizes):
            name = getattr(event, "anchor", "")
            raise yaml.MarkedYAMLError(problem=f"*{name} stands inside of what it repeats", problem_mark=mark)
        self._values += self._sizes[node] if alias else 1
        if self._values > MOST_VALUES:
            raise yaml.MarkedYAMLError(
                problem=f"more than {MOST_VALUES:,} values, aliases written out", problem_mark=mark
            )
        if not alias:
            self._sizes[node] = self._values - before
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse keys that are not text and keys that come twice."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is not text", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key!r}", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_map(self, node: yaml.MappingNode) -> Any:
        """Check a mapping before PyYAML resolves its merge keys."""
        data: dict[Hashable, Any] = {}
        yield data
        data.update(self.construct_mapping(node))


class _QuickLoader(_Loader):
    """The same of what libyaml reads, which takes a fifth of the time."""

    def __init__(self, stream: Any) -> None:
        super().__init__("")
        events = yaml.CLoader(stream)
        for name in ("check_event", "peek_event", "get_event"):
            setattr(self, name, getattr(events, name))


class _Dumper(yaml.SafeDumper):
    """The safe dumper: it quotes text that either version of YAML would take for something else."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indent lists as well."""
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal parts out each time: nobody wants anchors in a recipe."""
        return True


# Only the types of JSON: no dates, sets or bytes.
_Loader.yaml_constructors = {
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq")
}
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_yaml_map)
for _tag, _pattern, _first in _RULES:
    _letters = ["" if letter == "\0" else letter for letter in _first]
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _letters)
    _Dumper.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _letters)


_OTHERWISE = re.compile(r"[\t!?]|[|>][^\n]*#")


def parse(text: str) -> Any:
    """Return what ``text`` holds; a float without a fraction (``1e6``) becomes an integer, which every key takes.

    Raises:
        UserError: bad YAML, a duplicate key, a number that is not finite or a whole one of more than 64 bits, or more
            text, values or depth than a recipe has; one line, with the line number where there is one.
    """
    if len(text) > MOST_TEXT:
        raise UserError(f"{len(text):,} characters, which are more than {MOST_TEXT:,}")
    try:
        return _tidy(_load(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(f"{where}{error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError, LookupError) as error:
        raise UserError(" ".join(str(error).split())) from None


def _load(text: str) -> Any:
    # libyaml counts columns in bytes, and takes characters, tabs, question marks and tags otherwise than PyYAML does.
    if yaml.__with_libyaml__ and text.isascii() and not _OTHERWISE.search(text):
        try:
            return yaml.load(text, Loader=_QuickLoader)
        except (yaml.YAMLError, RecursionError, LookupError):
            pass
    return yaml.load(text, Loader=_Loader)


def dump(tree: Any) -> str:
    """Return ``tree`` as YAML that :func:`parse` reads back unchanged."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**20)
    return text


def _tidy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tidy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_tidy(item) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UserError(f"{value} is not a finite number")
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
        raise UserError("a whole number of more than 64 bits")
    return value
