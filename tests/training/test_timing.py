"""Where the time of a step goes: against pipelines of known stage times, and in real runs."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from ranks import megavlm, script
from run_data import RunData
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megavlm.cli import main
from megavlm.parallel.faults import VARIABLE
from megavlm.parallel.stopwatch import StepTimes
from megavlm.training.timing import RankTimes, figures

WORKER = Path(__file__).with_name("timing_worker.py")


def rank(stage: int, replica: int, forward: float, backward: float, schedule: float, waiting: float = 0.0) -> RankTimes:
    """Return a rank whose step takes 10 s, of which 1 s is for data."""
    times = StepTimes(10.0, 1.0, schedule, 9.0 - schedule, forward, backward, waiting, 0.5, 0.25)
    return RankTimes(stage, replica, 1.0, times)


def test_figures_of_a_job() -> None:
    """PP 2 x DP 2: the second replica is slow, its last stage most of all."""
    ranks = [rank(0, 0, 2.0, 3.0, 6.0), rank(0, 1, 2.0, 3.0, 8.0), rank(1, 0, 1.0, 2.0, 5.0), rank(1, 1, 3.0, 4.0, 7.0)]
    values = figures(ranks)
    assert values["bubble_fraction/0"] == pytest.approx(((1 - 5 / 6) + (1 - 5 / 8)) / 2)
    assert values["bubble_fraction/1"] == pytest.approx(((1 - 3 / 6) + (1 - 7 / 8)) / 2)  # of their replica's schedule
    assert values["bubble_fraction_largest"] == values["bubble_fraction/1"]
    assert values["bubble_fraction"] == pytest.approx((values["bubble_fraction/0"] + values["bubble_fraction/1"]) / 2)
    assert values["stage_seconds/1"] == 5.0 and values["stage_backward_seconds/1"] == 3.0
    assert values["schedule_seconds"] == 7.0 and values["update_seconds"] == pytest.approx(2.0)
    assert values["communication_fraction"] == pytest.approx(0.075)
    assert values["slowest_rank"] == 3 and values["slowest_rank_seconds"] == 7.0
    assert values["slowest_rank_ratio"] == pytest.approx(7 / 5)


def test_who_waits_in_a_pass_is_not_slow() -> None:
    """Tensor-parallel ranks are in their passes equally long; the one that does not wait there is the slow one."""
    values = figures([rank(0, 0, 3.0, 3.0, 6.5, waiting=2.5), rank(0, 0, 3.0, 3.0, 6.5, waiting=0.5)])
    assert values["slowest_rank"] == 1 and values["slowest_rank_seconds"] == 5.5
    assert values["communication_fraction/in_compute"] == pytest.approx(0.15)
    assert "bubble_fraction" not in values  # one stage


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    """The steps of each pipeline."""
    out = tmp_path_factory.mktemp("timing") / "found.json"
    script(WORKER, out, world=2, timeout=600)
    found: dict[str, list[dict[str, float]]] = json.loads(out.read_text())
    return found


def quietest(steps: list[dict[str, float]]) -> dict[str, float]:
    """Return the figures of the step that took least: the one in which a busy machine kept no rank from its core."""
    return min(steps, key=lambda step: step["timed_step_seconds"])


@pytest.mark.long
@pytest.mark.dist
@pytest.mark.parametrize("count", [2, 8])
def test_bubble_of_equal_stages(count: int, pipelines: dict[str, list[dict[str, float]]]) -> None:
    """Within 10 points of 1F1B's (p - 1) / (m + p - 1): 33 % with 2 micro-batches, 11 % with 8."""
    values = quietest(pipelines[f"even-{count}"])
    assert values["bubble_fraction"] == pytest.approx(1 / (count + 1), abs=0.1)
    assert values["bubble_fraction_largest"] >= values["bubble_fraction"]
    for stage in (0, 1):
        assert values[f"stage_seconds/{stage}"] >= count * 0.06
        assert values[f"bubble_fraction/{stage}"] == pytest.approx(1 / (count + 1), abs=0.15)


@pytest.mark.long
@pytest.mark.dist
def test_a_slow_stage_is_named_and_the_other_idles(pipelines: dict[str, list[dict[str, float]]]) -> None:
    values = quietest(pipelines["second-slow"])
    assert values["slowest_rank"] == 1
    assert values["stage_seconds/1"] > 1.5 * values["stage_seconds/0"]
    assert values["bubble_fraction/0"] > values["bubble_fraction/1"] + 0.25
    # The idle stage waits for the other in its receives.
    assert values["communication_fraction/between"] > 0.15


@pytest.mark.long
@pytest.mark.dist
@pytest.mark.parametrize("name", ["even-2", "even-8", "second-slow"])
def test_parts_add_up_to_the_step(name: str, pipelines: dict[str, list[dict[str, float]]]) -> None:
    """Data, schedule and update are three spans of their own; little is between them, and they do not overlap."""
    shares = []
    for step in pipelines[name]:
        parts = step["data_seconds"] + step["schedule_seconds"] + step["update_seconds"]
        shares.append(parts / step["timed_step_seconds"])
        assert parts <= 1.001 * step["timed_step_seconds"] <= 1.002 * step["wall"]
        for stage in (0, 1):
            passes = step[f"stage_forward_seconds/{stage}"] + step[f"stage_backward_seconds/{stage}"]
            assert passes == pytest.approx(step[f"stage_seconds/{stage}"]) and passes < step["schedule_seconds"]
            idle = step[f"bubble_fraction/{stage}"] * step["schedule_seconds"]
            assert passes + idle == pytest.approx(step["schedule_seconds"])
    # The best step: on a busy machine a rank may have to wait for a core between two spans, and these are short steps.
    assert max(shares) > 0.9


def train(data: RunData, output: Path, *overrides: str) -> str:
    """Run ``megavlm train`` at TP 2; return what it printed."""
    words = ("parallel.tensor_model_parallel_size=2", "logging.timing_interval=1", *overrides)
    return megavlm(data.words(output, *words), world=2, timeout=600).output


def lines(output: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's steps."""
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "loss" in line]


def operations(trace: Path) -> set[str]:
    """Return the names in a trace."""
    return {event["name"] for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}


@pytest.fixture(scope="module")
def slow_run(run_data: RunData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A TP 2 run whose second rank is slow in every forward pass, cut off after step 3 and resumed."""
    output = tmp_path_factory.mktemp("slow") / "run"
    words = ("logging.profile_steps=[3,5]", "logging.profile_ranks=[1]", "logging.panel_interval=6")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "step.forward:rank1:slow")
        text = train(run_data, output, "training.train_steps=3", "logging.profile_steps=[3,3]", *words[1:])
        return output, text + train(run_data, output, *words)


@pytest.mark.long
@pytest.mark.dist
def test_a_slow_rank_is_named(slow_run: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Though tensor-parallel ranks take equally long for a pass, as each waits for the other in it."""
    output, text = slow_run
    timed = [line for line in lines(output) if "slowest_rank" in line]
    assert [line["step"] for line in timed] == [1, 2, 6]  # profiled steps are not timed
    for line in timed:
        assert line["slowest_host"] and line["slowest_rank_seconds"] > 2 * 0.05  # two micro-batches
        assert line["communication_fraction/between"] < 0.02  # there is one stage
    line = quietest(timed)
    assert line["slowest_rank"] == 1 and line["slowest_rank_ratio"] > 1.1
    assert line["communication_fraction/in_compute"] > 0.1
    assert all(line["memory_gib"] > 0.05 and line["memory_rank"] in (0, 1) for line in lines(output))
    assert "slowest rank 1 on " in text and "communication " in text
    assert main(["doctor", "--quick", str(output)]) == 0
    assert "slowest rank: 1 on " in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.dist
def test_the_last_rank_writes_tensorboard(slow_run: tuple[Path, str]) -> None:
    output, _ = slow_run
    beat = json.loads((output / "heartbeats" / "rank-1.json").read_text())
    files = sorted((output / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime)
    assert len(files) == 2 and f".{beat['pid']}." in files[-1].name
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert tags["images"] == ["held_out"]  # drawn by the first rank
    assert [event.step for event in events.Scalars("loss/total")] == [1, 2, 3, 4, 5, 6]
    assert set(tags["scalars"]) >= {
        "pipeline/stage_seconds_0",
        "communication/fraction",
        "communication/fraction_in_compute",
        "memory/peak_gib",
        "memory/peak_rank",
        "slowest_rank/rank",
        "time/schedule_seconds",
        "time/data_wait_seconds",
    }


@pytest.mark.long
@pytest.mark.dist
def test_profiles_hold_the_steps_of_a_run_and_of_its_resumption(slow_run: tuple[Path, str]) -> None:
    output, _ = slow_run
    traces = sorted((output / "profile").iterdir())
    assert [trace.name for trace in traces] == [
        "rank-1-steps-3-3.pt.trace.json.gz",
        "rank-1-steps-4-5.pt.trace.json.gz",
    ]
    first, second = map(operations, traces)
    assert {"step 3", "aten::mm", "aten::scaled_dot_product_attention", "gloo:all_reduce"} <= first
    assert {"step 4", "step 5"} <= second and not {"step 3", "step 6"} & second


def written(directory: Path, seconds: list[float]) -> Path:
    """Write a run's metrics.jsonl with these step times; every point names rank 3 but the first."""
    steps = enumerate(seconds, start=1)
    points = [
        {"step": step, "step_seconds": value, "slowest_rank": 3.0 * (step > 1), "slowest_rank_ratio": 1.5}
        | {"slowest_host": "node7"}
        for step, value in steps
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points) + '{"step": 9')
    for number in (0, 3):
        beat = {"rank": number, "step": len(seconds), "time": 0.0, "phase": "done", "host": "node7"}
        (directory / "heartbeats").mkdir(exist_ok=True)
        (directory / "heartbeats" / f"rank-{number}.json").write_text(json.dumps(beat))
    return directory


@pytest.mark.parametrize(("last", "word"), [(1.0, False), (1.6, True)])
def test_doctor_tells_a_run_that_became_slower(
    last: float, word: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written(tmp_path, [9.0, 1.0, 1.0, 1.0, 1.1, 1.2, 1.3, last, 1.3, last, last, last])
    assert main(["doctor", "--json", str(run)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["step_seconds"] == {"first": 1.0, "last": last, "factor": last}
    assert facts["slowest_measured"] == {
        "rank": 3, "host": "node7", "points": 11, "of": 12, "ratio_to_its_stage": 1.5
    }  # fmt: skip
    main(["doctor", str(run)])
    text = capsys.readouterr().out
    assert ("the run became slower" in text) == word and f"{last:.3f} s at last" in text
    assert "slowest rank: 3 on node7, in 11 of 12 timed points; it computes 1.50 x its stage's mean" in text


def test_doctor_of_a_short_run_says_nothing_of_trends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(written(tmp_path, [1.0, 2.0, 3.0]))]) == 0
    assert "step time" not in capsys.readouterr().out
