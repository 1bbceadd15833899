"""What no linter holds: sizes of files and functions, one meaning a class name, how `make test` starts."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from import_graph import ROOT, modules
from test_layering import ROOMS

FILE_LINES, FUNCTION_LINES = 500, 80
SEVERAL_MEANINGS = {
    # weights.source: a checkpoint's tensors; data.formats.source: what prepare was given. Formats that others write
    # import the one, families that others write the other: both names are published, and no file needs both.
    "Source",
}
"""Class names that stand in several files, and why."""
FOLDERS = ("megavlm", "tests", "benchmarks", "tools")


@cache
def trees() -> dict[Path, ast.Module]:
    files = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_files_and_functions_have_a_size() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {count} lines"
        for path in trees()
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > FILE_LINES
    ]
    long += [
        f"{path.relative_to(ROOT)}: {function.name}: {count} lines"
        for path, tree in trees().items()
        for function in functions(tree)
        if (count := (function.end_lineno or 0) - function.lineno + 1) > FUNCTION_LINES
    ]
    assert not long


def test_a_class_name_has_one_meaning() -> None:
    """Also with an underscore in front: who reads ``_Job`` beside ``Job`` takes the one for the other."""
    where = defaultdict(list)
    for name, path in modules().items():
        for node in ast.walk(trees()[path]):
            if isinstance(node, ast.ClassDef):
                where[node.name.lstrip("_")].append(name)
    twice = {name: places for name, places in where.items() if len(places) > 1}
    assert twice.keys() == SEVERAL_MEANINGS, {name: twice.get(name) for name in twice.keys() ^ SEVERAL_MEANINGS}


def test_contributing_names_every_room_and_no_test_that_is_gone() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition("## Which tests to run")[2].partition("###")[0]
    assert not [room for room in ROOMS if room != "cli" and f"`{room}/" not in table]
    named = re.findall(r"(?:tests|benchmarks)/[\w/.]*\w", text)
    assert len(named) > 20 and not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize(
    ("words", "spread"),
    [
        ((), True),
        (("PYTEST_ARGS=-k 'a or b'",), True),
        (("WORKERS=0",), False),
        (("PYTEST_ARGS=-p no:xdist -x",), False),
        (("PYTEST_ARGS=-k a --pdb",), False),
        (("PYTEST_ARGS=-s",), False),
    ],
)
def test_tests_take_one_process_where_two_cannot_do_it(words: tuple[str, ...], spread: bool) -> None:
    clean = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "PYTEST_ARGS", "WORKERS")}
    command = ["make", "-n", "test", *words]
    said = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=True, timeout=600).stdout
    (line,) = (one for one in said.splitlines() if "-m pytest tests" in one)
    assert ("-n 2 --dist loadfile" in line) is spread and "-m 'not long" in line
