"""Mamba trains and answers at any layout as in one process: packs of short segments, adapters, bf16, recomputation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks

FP32, BF16 = 1e-5, 4e-3
PP2 = {"pipeline_model_parallel_size": 2}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
FULL = {"recompute_granularity": "full"}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 9000}
"""Small buckets: weights of a step's second half are on their way while its first layers run."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2 pp2 sp": {**PP2, **TP2_SP},
    "pp2 vpp2 dp2": {**PP2, **FULL, "virtual_pipeline_model_parallel_size": 2},
    "tp2 sp dp2": {**TP2_SP, **FULL, **OVERLAP},
    # So small that a bucket has weights that no module's call waits for, and nothing else.
    "pp2 dp2": {**PP2, **OVERLAP, "ddp_bucket_size": 1000},
}
ADAPTERS = {
    "lora": {"rank": 3, "targets": ["in_proj", "x_proj"]},
    "modules": {"vision": {"freeze": True}},
}
HALF = {"training": {"precision": "bf16"}}


@pytest.mark.long
def test_it_trains_and_answers_at_any_layout_as_in_one_process(tmp_path: Path) -> None:
    weights = str(tmp_path / "mamba" / "step-00000000")
    kinds: dict[str, dict[str, Any]] = {"whole": {}, "adapters": ADAPTERS, "bf16": HALF}
    asked = [{**more, "weights": weights} for more in kinds.values()]
    ((*found, again),) = ranks.run("mamba_cases:train", [*asked, {**asked[0], "parallel": FULL}], world=1)
    alone = dict(zip(kinds, found, strict=True))
    for key in ("loss", "norm"):
        assert again[key] == pytest.approx(alone["whole"][key], rel=1e-6)
        assert alone["bf16"][key] == pytest.approx(alone["whole"][key], rel=10 * BF16)
    assert {kind.rpartition(".")[2] for kind in alone["adapters"]["sums"]} == {"lora_a", "lora_b"}
    assert min(alone["adapters"]["sums"].values()) > 0, "A and B have learned"
    jobs = [{**one, "parallel": layout} for layout in LAYOUTS.values() for one in asked]
    names = [(kind, name) for name in LAYOUTS for kind in kinds]
    for rank in ranks.run("mamba_cases:train", jobs, world=4, timeout=600):
        for (kind, name), got in zip(names, rank, strict=True):
            close = BF16 if kind == "bf16" else FP32
            for key in ("loss", "norm"):
                wanted = pytest.approx(alone[kind][key], rel=close * (5 if key == "norm" else 1))
                assert got[key] == wanted, (kind, name)
            wanted = pytest.approx(alone[kind]["sums"], rel=max(5 * close, 1e-4), abs=1e-7)
            assert got["sums"] == wanted, (kind, name)
    ((answers, plain),) = ranks.run("mamba_cases:answer", [asked[0], {**asked[0], "plain": True}], world=1)
    assert plain == answers and len({len(one) for one in answers}) > 2
    jobs = [{**asked[0], "parallel": layout} for layout in LAYOUTS.values()]
    for rank in ranks.run("mamba_cases:answer", jobs, world=4):
        assert rank == [answers] * len(LAYOUTS)
