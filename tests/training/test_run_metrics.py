"""What a run writes of steps that have no loss, or one that is no number; and of a lock that is lost."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import recipe
from step_cases import share
from tiny import IMAGE_TOKEN

from megavlm.config.schema import ParallelConfig, Recipe
from megavlm.data.batch import make_pack
from megavlm.data.read_pack import ReadPack
from megavlm.parallel.lock import acquire
from megavlm.parallel.state import process_groups
from megavlm.training.build import TrainingModel, build_training
from megavlm.training.heldout import HeldOut, validate
from megavlm.training.metrics import Metrics, progress_line
from megavlm.training.progress import Progress
from megavlm.training.step import StepResult, train_step


@pytest.fixture(scope="module")
def built() -> Iterator[tuple[Recipe, TrainingModel]]:
    with process_groups(ParallelConfig(), seed=1):
        one = recipe(logging={"log_interval": 1, "tensorboard": False}, training={"global_batch_size": 1})
        yield one, build_training(one, IMAGE_TOKEN)


def refuse(word: str) -> Any:
    raise AssertionError(f"{word} is no JSON")


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(x, parse_constant=refuse) for x in (directory / "metrics.jsonl").read_text().splitlines()]


def step(metrics: Metrics, training: TrainingModel, count: int, result: StepResult | None = None) -> None:
    batch = [share(1, 1, count)]
    metrics.begin()
    metrics.fetched()
    training.scheduler.step(1)
    metrics.step(result or train_step(training.chunks, training.optimizer, batch, 1), batch, {"language": 0.1})


def test_a_step_without_labels_has_no_loss_in_the_figures(built: tuple[Recipe, TrainingModel], tmp_path: Path) -> None:

    recipe, training = dataclasses.replace(built[0], output_dir=str(tmp_path)), built[1]
    metrics = Metrics(recipe, Progress(), None, training.configs)
    step(metrics, training, 20)
    step(metrics, training, 0)
    step(metrics, training, 20, StepResult(torch.tensor([[9.0, 3.0]]).double(), float("inf"), "not finite"))
    metrics.close()
    first, second, third = lines(tmp_path)
    assert first["loss"] > 0 and first["grad_norm"] > 0
    assert "loss" not in second and "grad_norm" not in second and second["useful_tokens_per_second"] == 0
    assert "loss" not in third and third["grad_norm"] is None
    assert "no loss" in progress_line(second, 2, 9)


def test_nothing_is_written_once_the_lock_is_lost(built: tuple[Recipe, TrainingModel], tmp_path: Path) -> None:

    recipe, training = dataclasses.replace(built[0], output_dir=str(tmp_path)), built[1]
    lock = acquire(tmp_path / "lock.json", "train", "x", timeout_seconds=60)
    metrics = Metrics(recipe, Progress(), None, training.configs, lock)
    step(metrics, training, 20)
    lock.path.unlink()
    lock.look()
    step(metrics, training, 20)
    metrics.close()
    lock.release()
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_held_out_data_without_labels_have_no_loss(
    built: tuple[Recipe, TrainingModel], caplog: pytest.LogCaptureFixture
) -> None:
    """0 would be the best loss of all."""
    recipe, training = built
    size = recipe.model.vision.image_size
    empty = ReadPack(make_pack([], recipe.data.sequence_length), torch.zeros(0, 3, size, size, dtype=torch.uint8))
    full = make_pack([], recipe.data.sequence_length)
    full.labels[:9], full.segment_sources[:] = 11, 0
    held_out = [HeldOut("none", [empty], 1), HeldOut("some", [ReadPack(full, empty.pixels)], 1)]
    found = validate(training.chunks, held_out)
    assert set(found) == {"validation_loss", "validation_loss/some"} and found["validation_loss"] > 1
    assert found["validation_loss"] == found["validation_loss/some"]
    assert "data.validation none: no token has a label" in caplog.text
    assert validate(training.chunks, held_out[:1]) == {}
