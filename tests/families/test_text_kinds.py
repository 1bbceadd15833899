"""Every kind of decoder computes what its reference does: loss, logits, all gradients and answers, at two layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
from text_cases import ELSEWHERE, ROWS, branches_of, compare_all, kinds

TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("text")
    return folder, branches_of(folder, list(ROWS))


def test_every_kind_has_a_row() -> None:
    assert kinds() == {row.preset for row in ROWS.values()} | ELSEWHERE


def test_all_kinds_at_one_process(written: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    folder, branches = written
    assert {name: branch["preset"] for name, branch in branches.items()} == {n: row.preset for n, row in ROWS.items()}
    found = compare_all(branches, str(folder), {})
    assert found.keys() == ROWS.keys()


def test_all_kinds_at_tp2_pp2_with_sequence_parallelism(written: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    """In one start of ranks; together they compare every parameter."""
    folder, branches = written
    results = ranks.run("text_cases:compare_all", branches, str(folder), TP2_PP2, world=4, timeout=240)
    for name in ROWS:
        there = {key for found in results for key in found[name]}
        assert sum("layers." in key for key in there) == 4 * sum("layers.0." in key for key in there) > 0
