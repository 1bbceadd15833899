"""Every registered tower and connector trains alike wherever it lies: first stage, all ranks, shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from family_choice import changed_of
from run_cases import numbers
from test_matrix import branches, folder_of, fronts, make_model, packed

from megavlm.architectures import connectors, towers
from megavlm.config.architecture import CONNECTORS, VISION

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
def test_every_tower_and_connector(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Losses, norms, held-out losses, weights and moments; towers of presets that store the same are tried once."""
    wrong = []
    parts = {
        f"{vision} {connector}": [folder_of(VISION.find(vision)), folder_of(CONNECTORS.find(connector))]
        for vision, connector in fronts()
    }
    for vision, connector in map(str.split, changed_of(request.config, request.path, parts)):
        try:
            check(vision, connector, tmp_path / f"{vision} {connector}")
        except AssertionError as error:
            wrong.append(f"{vision} with {connector}: {error}")
    assert not wrong, "\n".join(wrong)


def renderings(vision: str, connector: str) -> int:
    """Return how many renderings of a picture a tower takes."""
    return len(make_model(vision, connector).vision.sides)


def check(vision: str, connector: str, root: Path) -> None:
    """Train a model at every placement, in one start of ranks: what they hold outlives a job."""
    model = branches(vision, connector, "llama")
    several = renderings(vision, connector) > 1
    model["image"] = {"kind": "native" if packed("vision", vision) else "fit_pair" if several else "squash"}
    if packed("vision", vision) and CONNECTORS.find(connector).architecture.name == "mlp":  # a token of each patch
        model["vision"]["spatial_merge_size"] = 1
    optimizer = {"lr": 1e-3, "clip_grad": 0.5, "weight_decay": 0.1, "adam_eps": 1e-4}
    jobs = {
        placement: {
            "recipe": {"model": model, "parallel": LAYOUT | keys, "optimizer": optimizer}, "alike": True,
            "weights": str(root / "weights" / "step-00000000"), "save": str(root / placement),
            "steps": (0, STEPS), "without": (1,),
        }
        for placement, keys in PLACEMENTS.items()
    }  # fmt: skip
    results = ranks.run("placement_cases:run_jobs", jobs, world=4)[0]
    first, *others = ((results[name], numbers(root / name / f"step-{STEPS:08}")) for name in PLACEMENTS)
    assert any(key.startswith("vision.") for key in first[1])
    for placement, (got, now) in zip(list(PLACEMENTS)[1:], others, strict=True):
        for key in ("loss", "grad_norm", "validation"):
            assert got[key] == pytest.approx(first[0][key], rel=NEAR), (placement, key)
        assert first[1].keys() == now.keys()
        for key, values in first[1].items():
            words = f"{placement}: {key}: "
            torch.testing.assert_close(now[key], values, rtol=NEAR, atol=NEAR, msg=lambda m, w=words: w + m)
