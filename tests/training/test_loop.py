"""The trainer as its users run it: resume, stop in time, validation, logs, and refusals."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from ranks import megavlm, start
from run_data import RunData
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TP2_PP2 = (
    "parallel.tensor_model_parallel_size=2",
    "parallel.pipeline_model_parallel_size=2",
    "parallel.sequence_parallel=true",
)
DP2 = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")


def train(data: RunData, output: Path, *overrides: str, ranks: int = 1) -> str:
    """Run ``megavlm train``; return what it printed."""
    return megavlm(data.words(output, *overrides), world=ranks).output


def lines(output: Path, key: str = "loss") -> dict[int, float]:
    """Return a figure by step, from the run's metrics.jsonl; a step that was run twice must not change."""
    found: dict[int, float] = {}
    for line in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()):
        if key in line:
            assert found.get(line["step"], line[key]) == pytest.approx(line[key], rel=1e-6)
            found[line["step"]] = line[key]
    return found


@pytest.fixture(scope="module")
def whole(run_data: RunData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A whole run on one process, with everything that is shown."""
    output = tmp_path_factory.mktemp("whole")
    text = train(
        run_data,
        output,
        "training.validation_interval=3",
        "logging.panel_interval=6",
        "checkpoint.save_interval=3",
        "checkpoint.keep=5",
    )
    return output, text


def resume_at(finished: Path, step: int, output: Path) -> Path:
    """Copy a finished run, as if it had been cut off after its checkpoint at ``step``."""
    shutil.copytree(finished, output)
    for path in (output / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return output


def test_resume_equals_uninterrupted(run_data: RunData, whole: tuple[Path, str], tmp_path: Path) -> None:
    output = resume_at(whole[0], 3, tmp_path / "run")
    text = train(run_data, output)
    assert "resumed from" in text and "at step 3" in text
    assert text.count("| loss") == 3  # steps 4 to 6 ran again, and lines() compares them
    assert lines(output) == pytest.approx(lines(whole[0]), rel=1e-6)


@pytest.mark.parametrize(("ranks", "layout"), [(4, TP2_PP2), (2, DP2)], ids=["tp2-pp2-sp", "dp2-overlap"])
def test_resume_at_a_layout(ranks: int, layout: tuple[str, ...], run_data: RunData, tmp_path: Path) -> None:
    words = (*layout, "training.train_steps=4", "checkpoint.save_interval=2", "checkpoint.keep=9")
    train(run_data, tmp_path / "whole", *words, ranks=ranks)
    output = resume_at(tmp_path / "whole", 2, tmp_path / "run")
    text = train(run_data, output, *words, ranks=ranks)
    assert "at step 2" in text and text.count("| loss") == 2
    assert sorted(lines(output)) == [1, 2, 3, 4]


def test_resume_follows_a_changed_recipe(run_data: RunData, whole: tuple[Path, str], tmp_path: Path) -> None:
    output = resume_at(whole[0], 6, tmp_path / "run")
    text = train(run_data, output, "training.train_steps=8", "optimizer.lr=1e-3", "optimizer.schedule=constant")
    assert "at step 6" in text
    rates = lines(output, "lr/language")
    assert rates[8] == pytest.approx(1e-3)
    assert max(rates) == 8


def test_resume_of_a_complete_run_does_nothing(run_data: RunData, whole: tuple[Path, str]) -> None:
    before = (whole[0] / "metrics.jsonl").read_text()
    assert "the run is complete at step 6" in train(run_data, whole[0])
    assert (whole[0] / "metrics.jsonl").read_text() == before


def test_exit_after_minutes(run_data: RunData, tmp_path: Path) -> None:
    output = tmp_path / "run"
    text = train(run_data, output, "training.train_steps=100000", "training.exit_after_minutes=0.05", ranks=2)
    assert "time is up at step" in text
    run = json.loads(next((output / "checkpoints").glob("step-*/run.json")).read_text())
    assert 0 < run["step"] < 100000


def test_weights_alone_can_be_loaded(run_data: RunData, whole: tuple[Path, str], tmp_path: Path) -> None:
    fresh = lines(whole[0])
    train(run_data, tmp_path / "run", f"checkpoint.load={whole[0]}", "training.train_steps=3", ranks=2)
    loaded = lines(tmp_path / "run")
    assert sorted(loaded) == [1, 2, 3]
    assert loaded[1] < fresh[1] - 0.5  # starts where the other run ended


def test_validation(whole: tuple[Path, str]) -> None:
    losses = lines(whole[0], "validation_loss")
    assert sorted(losses) == [3, 6]
    assert losses == lines(whole[0], "validation_loss/heldout")
    assert losses[6] < losses[3]


def test_what_is_shown(whole: tuple[Path, str]) -> None:
    output, text = whole
    assert "step 6/6 | loss " in text
    for part in ("lr ", "grad norm ", "useful tok/s", "padding ", "data wait ", "s/step", "ETA 0:00:00"):
        assert part in text
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) >= {
        "loss/total",
        "loss/pictures",
        "lr/vision",
        "lr/connector",
        "lr/language",
        "optimizer/grad_norm",
        "speed/useful_tokens_per_second",
        "speed/tokens_per_second",
        "speed/images_per_second",
        "speed/step_seconds",
        "speed/data_wait_fraction",
        "data/padding_fraction",
        "validation/total",
    }
    assert "speed/mfu" not in tags["scalars"]  # the peak of a CPU is not known
    assert tags["images"] == ["held_out"]
    assert [event.step for event in events.Scalars("loss/total")] == [1, 2, 3, 4, 5, 6]
    assert {event.value for event in events.Scalars("speed/images_per_second")} - {0.0}


def test_counters(whole: tuple[Path, str]) -> None:
    run = json.loads((whole[0] / "checkpoints" / "step-00000006" / "run.json").read_text())
    assert run["step"] == 6
    assert run["packs"] == 12
    assert run["tokens"] + run["padding_tokens"] == 12 * 192
    assert 0 < run["supervised_tokens"] < run["tokens"]
    assert run["images"] > 0 and run["seconds"] > 0


def refused(data: RunData, output: Path, *overrides: str, code: int = 2) -> str:
    """Run ``megavlm train`` on one process without torchrun; return the last line of stderr."""
    done = megavlm(data.words(output, *overrides), check=False)
    assert done.code == code, done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_refusals(run_data: RunData, whole: tuple[Path, str], tmp_path: Path) -> None:
    line = refused(run_data, tmp_path / "run", "model.language.vocab_size=300")
    assert line.startswith("megavlm: error: model.language.vocab_size: 300 rows, but")
    line = refused(run_data, whole[0], "model.language.num_layers=2")
    assert line.startswith("megavlm: error: model.language.num_layers: 2, but")
    line = refused(run_data, whole[0], "training.seed=7", "training.train_steps=9")
    assert "seed 1234" in line
    if not torch.cuda.is_available():
        line = refused(run_data, tmp_path / "run", "training.precision=bf16", "engine.fp8=hybrid")
        assert line.startswith(
            "megavlm: error: engine.fp8: there is no CUDA device; install transformer-engine[pytorch]"
        )
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_ends_the_run(run_data: RunData, tmp_path: Path) -> None:
    words = ("optimizer.lr=1e30", "optimizer.clip_grad=0", "training.max_skipped_steps=1")
    line = refused(run_data, tmp_path / "run", *words, code=1)
    assert "2 steps in a row were skipped, more than training.max_skipped_steps" in line
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_nothing_half_written_is_seen(run_data: RunData, tmp_path: Path) -> None:
    """A run that is killed leaves only whole checkpoints, and goes on from the newest."""
    output = tmp_path / "run"
    words = run_data.words(output, "training.train_steps=100000", "checkpoint.save_interval=1")
    with start(words) as job:
        while job.stderr.count("saved") < 3:
            assert not job.poll(), job.stderr
            time.sleep(0.01)
        job.signal(signal.SIGKILL)
        assert job.wait(check=False).code == -signal.SIGKILL
    text = train(run_data, output, "training.train_steps=8")
    assert "resumed from" in text
