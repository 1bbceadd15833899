"""What tests have proven of families: outcomes of ``pytest.mark.proves``, kept in ``megavlm/families/proven.json``.

``@pytest.mark.proves("sizes", entry="preset")`` on a test of a family (``pytest.mark.family``) says which point of
``megavlm.families.proven.POINTS`` it proves, and which of its parameters says of what: a checkpoint, a preset; without
``entry`` the point has one thing to try. ``of={family: [entries]}`` is for one test of several families. With
``--record-proofs`` what passed is added to the record, and what failed is taken out of it; nothing else changes there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

RECORD = Path(__file__).parents[1] / "megavlm" / "families" / "proven.json"
_outcomes: dict[tuple[str, str, str], bool] = {}
Proof = tuple[str, str, str]
"""Family, point, entry."""


def proofs_of(item: pytest.Item) -> Iterator[Proof]:
    """Yield what a test proves."""
    marked = [name for mark in item.iter_markers("family") for name in mark.args]
    params = getattr(getattr(item, "callspec", None), "params", {})
    for mark in item.iter_markers("proves"):
        (point,) = mark.args
        of: Mapping[str, list[str]] = mark.kwargs.get("of", {})
        for family, entries in of.items():
            yield from ((family, point, entry) for entry in entries)
        for family in () if of else marked:
            entry = mark.kwargs.get("entry")
            yield family, point, "" if entry is None else str(params[entry])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Send along with the reports what the test proves; a worker of pytest-xdist sends them to the first process."""
    found = list(proofs_of(item))
    if found:
        item.user_properties.append(("proves", json.dumps(found)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Take what came out."""
    for name, value in report.user_properties:
        if name == "proves" and (report.when == "call" or report.outcome != "passed"):
            for family, point, entry in json.loads(str(value)):
                proof = family, point, entry
                _outcomes[proof] = _outcomes.get(proof, True) and report.outcome == "passed"


def merged(record: Mapping[str, Any], outcomes: Mapping[Proof, bool]) -> dict[str, Any]:
    """Return a record with what passed, and without what did not."""
    tree: dict[str, Any] = json.loads(json.dumps(record))
    for (family, point, entry), passed in outcomes.items():
        own = tree.setdefault(family, {}).setdefault("passed", {}).setdefault(point, [])
        if passed and entry not in own:
            own.append(entry)
        if not passed and entry in own:
            own.remove(entry)
    return tree


def written(tree: Mapping[str, Any]) -> str:
    """Return the file's text; a run must not change the order of what it does not change."""
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the record, once, in the process that sums up."""
    if session.config.getoption("--record-proofs") and not hasattr(session.config, "workerinput"):
        old = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
        RECORD.write_text(written(merged(old, _outcomes)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what the record does not have."""
    if config.getoption("--record-proofs") or not _outcomes:
        return
    old = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    new = [proof for proof, passed in _outcomes.items() if passed and proof[2] not in _passed(old, proof)]
    if new:
        families = ", ".join(sorted({family for family, _, _ in new}))
        terminalreporter.write_line(
            f"{len(new)} proofs that passed are not in proven.json (make families-record): {families}"
        )


def _passed(tree: Mapping[str, Any], proof: Proof) -> list[str]:
    found: list[str] = tree.get(proof[0], {}).get("passed", {}).get(proof[1], [])
    return found
