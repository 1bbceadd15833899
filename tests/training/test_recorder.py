"""Profiles and memory snapshots of chosen steps."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from run_data import RunData

from megavlm.commands.train import train
from megavlm.config.errors import RecipeError
from megavlm.config.logs import LoggingConfig
from megavlm.training.recorder import Recorder


def take(recorder: Recorder, *steps: int) -> None:
    """Take steps that multiply."""
    for step in steps:
        recorder.begin(step)
        torch.ones(8, 8) @ torch.ones(8, 8)
        recorder.end(step)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("profile/*"))


def test_a_run_that_ends_or_begins_inside_the_chosen_steps_writes_what_it_took(tmp_path: Path) -> None:
    settings = LoggingConfig(profile_steps=(2, 4), profile_ranks=(0, 3))
    recorder = Recorder(settings, tmp_path, 3)
    take(recorder, 1, 2)
    assert names(tmp_path) == []
    recorder.close()
    take(resumed := Recorder(settings, tmp_path, 3), 3, 4, 5)
    resumed.close()
    take(after := Recorder(settings, tmp_path, 3), 5, 6)
    after.close()
    assert names(tmp_path) == ["rank-3-steps-2-2.pt.trace.json.gz", "rank-3-steps-3-4.pt.trace.json.gz"]


def test_other_ranks_record_nothing(tmp_path: Path) -> None:
    take(recorder := Recorder(LoggingConfig(profile_steps=(1, 2)), tmp_path, 1), 1, 2, 3)
    recorder.close()
    assert not list(tmp_path.iterdir())


def test_a_profile_that_cannot_be_written_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("a file where the folder is to be")
    with caplog.at_level(logging.WARNING):
        take(Recorder(LoggingConfig(profile_steps=(1, 1)), tmp_path, 0), 1, 2)
    assert "cannot be written" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has memory to record")
def test_a_memory_snapshot_without_a_gpu_is_refused_before_anything_starts(run_data: RunData, tmp_path: Path) -> None:
    recipe = run_data.recipe(tmp_path / "run", "logging.memory_snapshot_steps=[1,2]")
    with pytest.raises(RecipeError, match=r"^logging\.memory_snapshot_steps: .* no CUDA device; set it to null$"):
        train(recipe)
    assert not dist.is_initialized() and not (tmp_path / "run").exists()
