"""Whole runs whose packs are shared by ranks: figures, a change of layout at a resume, panels, answers, plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ranks
from PIL import Image
from run_data import RunData

from megavlm.cli import main

pytestmark = [pytest.mark.long, pytest.mark.dist]

CP2 = "parallel.context_parallel_size=2"
TP2 = "parallel.tensor_model_parallel_size=2"
PP2 = "parallel.pipeline_model_parallel_size=2"
MORE = (
    "checkpoint.save_interval=2", "optimizer.warmup_steps=1", "optimizer.schedule=constant", "optimizer.adam_eps=1e-4",
    "logging.timing_interval=1", "training.validation_interval=2", "logging.panel_interval=2",
)  # fmt: skip
COUNTED = ("step", "padding_fraction", "supervised_tokens", "tokens", "images", "packs", "skipped_samples")


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_changes_who_has_its_packs(run_data: RunData, tmp_path: Path) -> None:
    """Begun at CP 2, gone on with at TP 2 and at CP 2 x PP 2: losses and counts as uninterrupted on one process."""
    ranks.megavlm(run_data.words(tmp_path / "whole", *MORE))
    for steps, world, words in ((2, 2, (CP2,)), (4, 2, (TP2,)), (6, 4, (CP2, PP2))):
        done = ranks.megavlm(
            [*run_data.words(tmp_path / "run", *MORE, *words), f"training.train_steps={steps}"], world=world
        )
        if CP2 in words:
            assert f"layout: TP 1 x CP 2 x PP {world // 2} x DP 1" in done.stdout
    compared, counted = 0, set()
    for alone, moved in zip(lines(tmp_path / "whole"), lines(tmp_path / "run"), strict=True):
        for key in {"loss", "validation_loss", "grad_norm"} & alone.keys():
            assert moved[key] == pytest.approx(alone[key], rel=1e-4), (key, moved["step"])
            compared += 1
        for key in alone.keys() & set(COUNTED):
            assert moved[key] == alone[key], (key, moved["step"])
            counted.add(key)
    assert compared > 12 and {"step", "padding_fraction"} <= counted, counted
    picture = tmp_path / "picture.png"
    Image.effect_noise((40, 30), 80).convert("RGB").save(picture)
    ask = ["generate", "--image", str(picture), "--prompt", "What is this?", "--max-new-tokens=6"]
    answers = [
        ranks.megavlm([*ask, str(tmp_path / "run"), *words], world=world, apart=True).stdout
        for words, world in (((), None), ((PP2,), 2))
    ]
    assert answers[0] == answers[1] and answers[0].strip()
    refused = ranks.megavlm([*ask, str(tmp_path / "run"), CP2], world=2, check=False)
    assert refused.code == 2 and "context_parallel_size: answers are not cut over ranks" in refused.output
    recipe = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1] / "recipe.yaml"
    assert main(["plan", str(recipe), "--gpus", "4"]) == 0
    assert main(["doctor", str(tmp_path / "run")]) == 0


def test_a_layout_that_does_not_fit_is_refused_in_one_line(run_data: RunData, tmp_path: Path) -> None:
    done = ranks.megavlm(run_data.words(tmp_path / "run", "parallel.context_parallel_size=3"), world=2, check=False)
    assert done.code == 2 and "parallel.context_parallel_size (3)" in done.output
    assert not (tmp_path / "run").exists()
