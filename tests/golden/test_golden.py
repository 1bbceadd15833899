"""Today's models train as they did when the numbers beside this file were written."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
from golden.cases import CASES, Measured, measure
from golden.compare import ROOT, differences, kept, main

from megavlm.parallel.device import has_cuda


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    if has_cuda():
        pytest.skip("the numbers are of CPUs; --against compares two commits on a GPU")
    return measure(tmp_path_factory.mktemp("golden"), ROOT)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_norms(name: str, found: dict[str, Measured]) -> None:
    if "skipped" in found[name]:
        pytest.skip(found[name]["skipped"])
    assert not (lines := differences({name: found[name]}, kept())), "\n".join(lines)


def test_each_says_what_it_is() -> None:
    for name, one in kept().items():
        case = CASES[name]
        assert (one["recipe"], one["layout"], one["ranks"]) == (case.recipe, case.layout, case.ranks)
        assert one["overrides"] == list(case.overrides), f"{name}: its keys changed; renew it with --write"
        assert one["versions"]["torch"] and one["machine"]
    assert kept().keys() == CASES.keys() and len(kept()["quickstart"]["loss"]) == 20


def test_a_difference_is_found() -> None:
    expected = {"alone": kept()["alone"]}
    for kind, factor, count in (("loss", 1 + 2e-5, 1), ("loss", 1 + 5e-6, 0), ("grad_norm", 1 + 8e-5, 1)):
        other = copy.deepcopy(expected)
        other["alone"][kind][2] *= factor
        lines = differences(other, expected)
        assert len(lines) == count and all(f"alone: step 3: {kind}" in line for line in lines)
        assert differences(other, expected, loss=0.0, norm=0.0)  # bit for bit
    other["alone"]["loss"][0] = float("nan")
    other["alone"]["grad_norm"].pop()
    assert len(differences(other, expected)) == 2
    assert differences(expected, {}) and not differences(expected, {"alone": {"skipped": "no"}})


def test_no_such_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("golden.compare.measured", lambda tree, names: {})
    with pytest.raises(SystemExit, match="--against no-such-commit: "):
        main(["--against", "no-such-commit"])


@pytest.mark.long
def test_the_command_compares_commits(tmp_path: Path) -> None:
    """Both trees are run, each with its own package, and no worktree is left."""
    git = ["git", "-C", str(ROOT), "worktree", "list"]
    if subprocess.run(git, capture_output=True, check=False).returncode:
        pytest.skip("this tree is no git repository")
    before = subprocess.run(git, capture_output=True, check=True).stdout
    words = [sys.executable, str(ROOT / "tests/golden/compare.py"), "--only", "llava", "--against", "HEAD"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.endswith("the same: llava\n"), done.stdout + done.stderr
    assert subprocess.run(git, capture_output=True, check=True).stdout == before
