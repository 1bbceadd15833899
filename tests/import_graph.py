"""Which module of the package, or file of the tests, imports which. Nothing is imported to find out."""

from __future__ import annotations

import ast
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
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names} & known.keys()
            found |= names or {node.module}
        elif named and isinstance(node, ast.Constant) and isinstance(node.value, str):
            # "module:function"
            found |= {match[1] for match in [re.fullmatch(r"([\w.]+):[\w.]+", node.value)] if match}
    return found & known.keys()


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
