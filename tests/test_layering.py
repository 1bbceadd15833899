"""The rooms of the house: each imports only from those below it (docs/architecture.md), and no two files in a circle.

Every import counts, also those inside functions and under ``TYPE_CHECKING``: a room that only knows a type of a higher
one cannot be understood, or tested, without it either.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

from import_graph import PACKAGE, imports, modules

ROOMS = (
    "cli", "commands", "quickstart", "training", "evaluation", "inference", "planning", "checkpoint", "families",
    "models", "architectures", "weights", "data", "layers", "parallel", "config",
)  # fmt: skip
"""From the roof down."""
NOT_YET: set[tuple[str, str]] = set()
"""(file, module) that break the rule today; to be empty."""
CIRCLES_YET: set[str] = set()
"""Files of circles that there are today; to be empty."""


def _modules() -> dict[str, Path]:
    return {name: path for name, path in modules().items() if path.parent != PACKAGE or path.stem == "cli"}


def _room(module: str) -> int:
    return ROOMS.index(module.split(".")[1])


def test_rooms_import_from_below() -> None:
    known = _modules()
    graph = {name: imports(path, known) for name, path in known.items()}
    upward = {(name, other) for name, others in graph.items() for other in others if _room(other) < _room(name)}
    assert upward == NOT_YET


def test_no_circles_of_files() -> None:
    known = _modules()
    graph = {name: imports(path, known) - {name} for name, path in known.items()}
    while free := {name for name, others in graph.items() if not others & graph.keys()}:
        graph = {name: others for name, others in graph.items() if name not in free}
    back = defaultdict(set)  # what is left lies on circles, or above one
    for name, others in graph.items():
        for other in others & graph.keys():
            back[other].add(name)
    while free := {name for name in graph if not back[name] & graph.keys()}:
        graph = {name: others for name, others in graph.items() if name not in free}
    assert graph.keys() == CIRCLES_YET, {name: sorted(others & graph.keys()) for name, others in graph.items()}


def test_only_parallel_asks_which_device_there_is() -> None:
    for name, path in _modules().items():
        if not name.startswith("megavlm.parallel"):
            asked = [
                node.lineno
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if (isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.cuda"))
                or (isinstance(node, ast.alias) and node.name == "has_cuda")
            ]
            assert not asked, f"{path}: lines {asked}; ask megavlm.parallel.device"


# What every family is, those that are registered, and what Transformers' towers and processors have in common.
OF_ALL_FAMILIES = {"family", "known", "registry", "presets", "preprocessor", "towers", "composing", "films"}


def test_converters_know_no_family() -> None:
    known = _modules()
    for name, path in known.items():
        if name.startswith("megavlm.checkpoint."):
            families = {m for m in imports(path, known) if m.startswith("megavlm.families.")}
            assert {m.removeprefix("megavlm.families.") for m in families} <= OF_ALL_FAMILIES, name
