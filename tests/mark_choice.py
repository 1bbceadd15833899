"""Files that have no test of the marks that ``-m`` asks for are not imported: ``-m slurm`` is one file of 270.

Importing all of them is twenty seconds of a processor, for each target of the Makefile. A file is left out where it
does not name a mark that all chosen tests have. So that none is lost by that, a test whose mark comes from another
file, while its own does not name it, fails every run that imports it, as ``make test`` imports them all.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

PICKED = frozenset({"long", "family", "proves", "reliability", "slurm", "browser", "full", "learning"})
"""The marks that targets of the Makefile ask for."""


def wanted(expression: str) -> frozenset[str]:
    """Return those of :data:`PICKED` that each test has that ``expression`` chooses; none where it is no plain list."""
    terms = [term.strip() for term in re.split(r"\band\b", expression)]
    plain = all(re.fullmatch(r"(not\s+)?\w+", term) and term not in ("or", "not") for term in terms)
    return frozenset(terms) & PICKED if plain else frozenset()


@functools.cache
def named(path: Path) -> frozenset[str]:
    """Return those of :data:`PICKED` that a file names as marks: ``mark.slurm``."""
    return frozenset(re.findall(r"\bmark\.(\w+)", path.read_text(encoding="utf-8"))) & PICKED


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out a file that can have nothing; never one that was named on the command line."""
    asked = wanted(config.getoption("markexpr"))
    if not asked or not collection_path.name.startswith("test_") or collection_path.suffix != ".py":
        return None
    if any(Path(word.partition("::")[0]).resolve() == collection_path for word in config.args):
        return None
    return True if asked - named(collection_path) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fail where a mark comes from elsewhere."""
    lost = {
        f"{item.path.name} must name mark.{mark.name}"
        for item in items
        for mark in item.iter_markers()
        if mark.name in PICKED - named(item.path)
    }
    if lost:
        raise pytest.UsageError(
            f"{'; '.join(sorted(lost))}: tests have it from another file; -m reads no file without (mark_choice.py)"
        )
