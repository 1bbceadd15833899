"""A run's MFU comes from the tokens and pictures of its packs, in each way of counting."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from samples import pack, recipe, sample

from megavlm.config.schema import ParallelConfig
from megavlm.parallel.state import process_groups
from megavlm.planning.flops import count_step
from megavlm.training import metrics
from megavlm.training.metrics import Metrics, progress_line
from megavlm.training.progress import Progress
from megavlm.training.step import StepResult

PEAK = 1e12
SAMPLES, PADDING = ((23, 1), (47, 2)), 26


def test_figures_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "peak_flops", lambda precision: PEAK)
    own = recipe(
        parallel={"recompute_granularity": "full"},
        logging={"log_interval": 2, "tensorboard": False},
        modules={"vision": {"freeze": True}},
    )
    own = dataclasses.replace(own, output_dir=str(tmp_path))
    padded = pack([sample(i, length, images) for i, (length, images) in enumerate(SAMPLES)], PADDING)
    full = pack([sample(2, 96)])
    progress = Progress()
    progress.step = 10
    with process_groups(ParallelConfig(), seed=1):
        one = Metrics(own, progress, None, [])
        one._first_step = 0  # no report of its own for the first step
        for batches in ([padded, full], [padded, padded]):
            one.begin()
            one.fetched()
            one.step(StepResult(torch.tensor([[9.0, 3.0]]).double(), 1.0), batches, {"language": 0.1})
        one.close()
    (line,) = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    padded_squares, squares = 23**2 + 47**2 + PADDING**2, 23**2 + 47**2
    flops = count_step(
        own,
        tokens=3 * 70 + 96,
        squared_lengths=3 * squares + 96**2,
        positions=4 * 96,
        squared_positions=3 * padded_squares + 96**2,
        images=9,
    )
    seconds = 2 * line["step_seconds"]
    assert line["mfu"] == pytest.approx(flops.useful / seconds / PEAK, rel=1e-9)
    assert line["mfu_conventional"] == pytest.approx(flops.conventional / seconds / PEAK, rel=1e-9)
    assert line["hfu"] == pytest.approx(flops.hardware / seconds / PEAK, rel=1e-9)
    assert 0 < line["mfu"] < line["mfu_conventional"] < line["hfu"]
    shown = progress_line(line | {"mfu": 0.381, "mfu_conventional": 0.42}, 12, 20)
    assert "MFU 38.1% (as usually counted 42.0%)" in shown
