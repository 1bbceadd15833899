"""Adapters at any layout train as in one process, leave frozen weights as they are, and go on exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launch import torchrun

WORKER = Path(__file__).with_name("lora_worker.py")
FP32 = 1e-5

TP2_PP2_SP = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2-pp2-sp": (4, TP2_PP2_SP),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2-vpp2-recompute": (
        2,
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2, "recompute_granularity": "full"},
    ),
    "dp2-overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
}
QWEN = {"rank": 4, "alpha": 16.0, "targets": ["c_attn", "attn.c_proj", "w1", "w2"]}
BOTH = {"train_embeddings": True, "train_head": True}
FREEZE = {"vision": {"freeze": True}}


def run(tmp: Path, name: str, base: Path, ranks: int, recipe: dict[str, Any], **job: Any) -> dict[str, Any]:
    """Train adapters; return what the worker wrote."""
    file, out = tmp / f"{name}.job.json", tmp / f"{name}.json"
    file.write_text(json.dumps({"recipe": recipe, "base": str(base), "out": str(out), **job}))
    torchrun(WORKER, file, ranks=ranks)
    return json.loads(out.read_text())


def same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got["loss"] == pytest.approx(expected["loss"], rel=FP32)
    assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=FP32)
    assert got["frozen_same"] and expected["frozen_same"]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return the base and what one process makes of it."""
    tmp = tmp_path_factory.mktemp("single")
    base = tmp / "step-00000000"
    return base, run(tmp, "single", base, 1, {"lora": QWEN | BOTH, "modules": FREEZE}, fill=True)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name: str, single: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    base, expected = single
    ranks, parallel = LAYOUTS[name]
    same(run(tmp_path, name, base, ranks, {"lora": QWEN | BOTH, "modules": FREEZE, "parallel": parallel}, fill=True), expected)

