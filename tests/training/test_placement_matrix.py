"""Every registered tower and connector trains alike wherever it lies: first stage, all ranks, shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from run_cases import numbers
from test_matrix import branches, fronts, packed

from megavlm.architectures import connectors, towers

STEPS = 3
NEAR = 1e-5
LAYOUT = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "first stage": {},
    "all ranks": {"vision_placement": "all_ranks"},
    "shards": {"vision_placement": "all_ranks", "vision_shards": "tensor"},
}
PARTS = [f"towers.{name}" for name in towers.FOLDERS] + [f"connectors.{name}" for name in connectors.FOLDERS]


@pytest.mark.long
@pytest.mark.dist
@pytest.mark.family("towers_and_connectors", parts=PARTS)
def test_every_tower_and_connector(tmp_path: Path) -> None:
    """Losses, norms, held-out losses, weights and moments; towers of presets that store the same are tried once."""
    jobs: dict[str, Any] = {}
    for vision, connector in fronts():
        name, model = f"{vision} + {connector}", branches(vision, connector, "llama")
        model["image"] = {"kind": "native" if packed("vision", vision) else "squash"}
        optimizer = {"lr": 1e-3, "clip_grad": 0.5, "weight_decay": 0.1, "adam_eps": 1e-4}
        for placement, keys in PLACEMENTS.items():
            recipe = {"model": model, "parallel": LAYOUT | keys, "optimizer": optimizer}
            jobs[f"{name}, {placement}"] = {
                "recipe": recipe, "weights": str(tmp_path / name / "weights" / "step-00000000"), "alike": True,
                "save": str(tmp_path / name / placement), "steps": (0, STEPS), "without": (1,),
            }  # fmt: skip
    by_rank = ranks.run("placement_cases:run_jobs", jobs, world=4, timeout=900)
    wrong, last = [], f"step-{STEPS:08}"
    for name in {name.partition(",")[0] for name in jobs}:
        expected, first = by_rank[0][f"{name}, first stage"], numbers(tmp_path / name / "first stage" / last)
        assert any(key.startswith("vision.") for key in first)
        for placement in ("all ranks", "shards"):
            got, now = by_rank[0][f"{name}, {placement}"], numbers(tmp_path / name / placement / last)
            try:
                for key in ("loss", "grad_norm", "validation"):
                    assert got[key] == pytest.approx(expected[key], rel=NEAR), key
                assert first.keys() == now.keys()
                for key, values in first.items():
                    torch.testing.assert_close(now[key], values, rtol=NEAR, atol=NEAR, msg=lambda m, k=key: f"{k}: {m}")
            except AssertionError as error:
                wrong.append(f"{name}, {placement}: {error}")
    assert not wrong, "\n".join(wrong)
