"""Every layout trains like one process: same weights, same global batch, same losses and gradient norms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launch import torchrun

WORKER = Path(__file__).with_name("layout_worker.py")
FP32 = 1e-5
BF16 = 2e-2  # bf16 has 8 bits of mantissa; sums are made in another order

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "tp2-pp2-sp": (
        4,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "dp2": (2, {}),
    "dp2-overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "dp2-plain-optimizer": (2, {"use_distributed_optimizer": False}),
    "pp2-vpp2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "pp2-uneven": (2, {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1}),
    "pp4-packed": (4, {"pipeline_model_parallel_size": 4}),
    "tp2-sp-recompute-full": (
        2,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "recompute_granularity": "full"},
    ),
    "pp2-recompute-selective": (2, {"pipeline_model_parallel_size": 2, "recompute_granularity": "selective"}),
}


def run(tmp: Path, name: str, ranks: int, recipe: dict[str, Any], weights: Path) -> dict[str, list[float]]:
    """Train 3 steps; return losses and gradient norms."""
    job, out = tmp / f"{name}.job.json", tmp / f"{name}.json"
    job.write_text(json.dumps({"recipe": recipe, "weights": str(weights), "out": str(out)}))
    torchrun(WORKER, job, ranks=ranks)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    """Return the initial weights and the losses of one process in fp32."""
    tmp = tmp_path_factory.mktemp("single")
    weights = tmp / "step-00000000"
    return weights, run(tmp, "single", 1, {}, weights)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name: str, single: tuple[Path, dict[str, list[float]]], tmp_path: Path) -> None:
    weights, expected = single
    ranks, parallel = LAYOUTS[name]
    got = run(tmp_path, name, ranks, {"parallel": parallel}, weights)
    assert got["loss"] == pytest.approx(expected["loss"], rel=FP32)
    assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=FP32)


@pytest.mark.parametrize("name", ["tp2-pp2-sp", "dp2"])
def test_bf16_with_fp32_masters(name: str, single: tuple[Path, dict[str, list[float]]], tmp_path: Path) -> None:
    weights, expected = single
    ranks, parallel = LAYOUTS[name]
    got = run(tmp_path, name, ranks, {"parallel": parallel, "training": {"precision": "bf16"}}, weights)
    assert got["loss"] == pytest.approx(expected["loss"], rel=BF16)
    assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=BF16)


def test_three_steps_learn(single: tuple[Path, dict[str, list[float]]]) -> None:
    _, expected = single
    assert len(set(expected["loss"])) == 3
    assert all(norm > 0 for norm in expected["grad_norm"])
