"""Every benchmark, in its published format, through the command line with a tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmark_files import COUNT, MAKERS, QUESTIONS

from megavlm import cli
from megavlm.evaluation.benchmarks import BENCHMARKS


def evaluate(checkpoint: Path, name: str, out: Path, *words: str) -> int:
    return cli.main(["eval", str(checkpoint), "--benchmark", name, f"--out={out}", "--panel-samples=2", *words])


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def test_all_have_a_fixture() -> None:
    assert set(MAKERS) == set(BENCHMARKS)


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_published_format(name: str, random_checkpoint: Path, tmp_path: Path) -> None:
    words = MAKERS[name](tmp_path / "data")
    assert evaluate(random_checkpoint, name, tmp_path / "out", *words, "--max-new-tokens=3") == 0
    found = rows(tmp_path / "out")
    assert len(found) == QUESTIONS.get(name, COUNT)
    assert len({row["id"] for row in found}) == len(found)
    assert not any("problem" in row for row in found)
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert all(0 <= value <= 2800 for value in scores["scores"].values())
    assert scores["questions_answered"] == len(found)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<img") == 2
    assert "<script" not in page
