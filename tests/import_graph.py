"""Which module of the package, or file of the tests, imports which. Nothing is imported to find out."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megavlm"
TESTS = ROOT / "tests"


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Return the package's files by module name."""
    return {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in package.rglob("*.py")
    }


def imports(path: Path, known: Mapping[str, Path], *, named: bool = False) -> set[str]:
    """Return the modules of ``known`` that a file imports, anywhere in it; if ``named``, also in strings."""
    whole, of, targets = _said(path, path.stat().st_mtime_ns)
    found = set(whole)
    for module, names in of:
        found |= {f"{module}.{name}" for name in names} & known.keys() or {module}
    return (found | targets if named else found) & known.keys()


@functools.cache
def _said(path: Path, _changed: int) -> tuple[set[str], list[tuple[str, list[str]]], set[str]]:
    """Return the modules that a file imports, what it imports from which, and modules of "module:function"."""
    whole: set[str] = set()
    of: list[tuple[str, list[str]]] = []
    targets: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            whole |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: a relative import"
            of.append((node.module, [alias.name for alias in node.names]))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            targets |= {match[1] for match in [re.fullmatch(r"([\w.]+):[\w.]+", node.value)] if match}
    return whole, of, targets


def graph(known: Mapping[str, Path], *, named: bool = False) -> dict[str, set[str]]:
    """Return what each module of ``known`` imports, or names."""
    return {name: imports(path, known, named=named) for name, path in known.items()}


def closure(start: Iterable[str], edges: Mapping[str, set[str]], *, parents: bool = True) -> set[str]:
    """Return ``start`` and all that it imports, through others too; if ``parents``, with the packages they lie in."""
    found: set[str] = set()
    waiting = list(start)
    while waiting:
        name = waiting.pop()
        if name in found or name not in edges:
            continue
        found.add(name)
        parts = name.split(".") if parents else []
        waiting += [".".join(parts[:length]) for length in range(1, len(parts))]
        waiting += edges[name]
    return found


def test_files() -> dict[str, Path]:
    """Return the files under ``tests``, by the bare name by which they import each other."""
    return {path.stem: path for path in TESTS.rglob("*.py")}


test_files.__test__ = False  # type: ignore[attr-defined]
