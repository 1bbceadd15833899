"""Context parallelism trains as one process: packs with pictures, whatever their segments, and checkpoints are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from run_cases import numbers
from test_placement import MODELS, PP2, SP, STEPS, TP2, VPP2, branches

FP32, BF16 = 1e-5, 2e-2
CP2, CP3, CP4 = ({"context_parallel_size": size} for size in (2, 3, 4))
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 9000}

Case = tuple[str, int, dict[str, Any]]
CASES: dict[str, Case] = {
    "CP 2": ("plain", 2, CP2),
    "short segments at CP 2": ("plain, short", 2, CP2),
    "CP 2 x TP 2 + SP": ("plain", 4, CP2 | TP2 | SP),
    "packed at CP 2 x PP 2": ("packed", 4, CP2 | PP2),
    "CP 2 x DP 2, overlapped": ("plain", 4, CP2 | OVERLAP),
}


def job(tmp: Path, name: str, save: str, parallel: dict[str, Any]) -> dict[str, Any]:
    model, _, short = name.partition(", ")
    return {
        "recipe": branches(model, parallel), "weights": str(tmp / "weights" / model / "step-00000000"),
        "save": str(tmp / save), "steps": (0, STEPS), "without": (2,), "short": bool(short),
    }  # fmt: skip


def together(tmp: Path, cases: dict[str, Case]) -> dict[str, list[dict[str, Any]]]:
    """Run cases, and the same models in one process; return by name what each rank gave."""
    starts = [(1, {name: job(tmp, name, name, {}) for name, _, _ in cases.values()})]
    for world in sorted({world for _, world, _ in cases.values()}):
        chosen = {case: one for case, one in cases.items() if one[1] == world}
        in_turn = sorted(chosen.items(), key=lambda one: [one[1][2].get(key, 1) for key in (*CP2, *TP2, *PP2, *VPP2)])
        starts.append((world, {case: job(tmp, name, case, p) for case, (name, _, p) in in_turn}))
    found: dict[str, list[dict[str, Any]]] = {}
    for world, jobs in starts:
        by_rank = ranks.run("placement_cases:run_jobs", jobs, world=world)
        found |= {name: [given[name] for given in by_rank] for name in jobs}
    return found


def check_equal(tmp: Path, case: str, name: str, results: dict[str, list[dict[str, Any]]]) -> None:
    (expected,), near = results[name], BF16 if name == "bf16" else FP32
    for got in results[case]:
        assert got["loss"] == pytest.approx(expected["loss"], rel=near)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=near)
        assert got["validation"] == pytest.approx(expected["validation"], rel=near)
    last = f"step-{STEPS:08}"
    whole, parts = numbers(tmp / name / last), numbers(tmp / case / last)
    assert whole.keys() == parts.keys()
    for key, values in whole.items():
        rows = min(len(values), len(parts[key])) if values.dim() else None  # a vocabulary is padded
        torch.testing.assert_close(
            parts[key][:rows], values[:rows], rtol=near, atol=near, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, Any]:
    """Run what is asked for."""
    tmp = tmp_path_factory.mktemp("context")
    asked = {one.callspec.params.get("case") for one in request.session.items if hasattr(one, "callspec")}
    return tmp, together(tmp, {case: one for case, one in CASES.items() if case in asked})


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_training_equals_one_process(case: str, results: tuple[Path, Any]) -> None:
    """Losses, gradient norms, held-out losses, weights and moments, with a step in which nobody has a picture."""
    check_equal(results[0], case, CASES[case][0], results[1])
