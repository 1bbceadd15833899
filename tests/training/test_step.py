"""The loss is the mean per supervised token of the global batch, however it is spread; no spread hangs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import script
from samples import losses, pack, recipe, sample
from step_cases import CASES, run, share, supervised
from tiny import IMAGE_TOKEN

from megavlm.config.schema import ParallelConfig
from megavlm.data.batch import IGNORE_INDEX
from megavlm.parallel.state import process_groups
from megavlm.training.build import build_training
from megavlm.training.guard import SKIPPED_FILE, StepGuard
from megavlm.training.loss import TaskMean
from megavlm.training.progress import Progress
from megavlm.training.step import StepResult, run_batches, train_step

FP32 = 1e-5


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    with process_groups(ParallelConfig(), seed=1):
        yield


@pytest.fixture(scope="module")
def two_replicas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what two data-parallel replicas make of every case; fails where they hang."""
    out = tmp_path_factory.mktemp("step") / "results.json"
    script(Path(__file__).with_name("step_cases.py"), out, world=2, timeout=600)
    return json.loads(out.read_text())


@pytest.mark.dist
@pytest.mark.parametrize("name", CASES)
def test_two_replicas_equal_one_process(name: str, two_replicas: dict[str, Any]) -> None:
    expected, got = run(CASES[name], [0, 1]), two_replicas[name]
    assert got["tokens"] == expected["tokens"]
    assert got["tokens"] == [sum(count for replica in CASES[name].replicas for _, count in replica)] * 2
    assert got["loss"] == pytest.approx(expected["loss"], rel=FP32)
    assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=FP32)
    assert got["weights"] == pytest.approx(expected["weights"], rel=FP32, abs=1e-6)


def test_gradients_are_those_of_the_mean_over_all_supervised_tokens() -> None:
    torch.manual_seed(0)
    training = build_training(recipe(), IMAGE_TOKEN)
    (module,) = training.modules
    batches = [share(1, 2, 40), share(2, 0, 0), share(3, 1, 1)]
    total = sum(losses(module, batch).sum() for batch in batches) / 41
    leaves = {name: p for name, p in module.named_parameters() if p.requires_grad}
    expected = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    for chunk in training.chunks:
        chunk.zero_grad_buffer()
    report = run_batches(training.chunks, batches, num_sources=1)
    assert StepResult(report, None).loss == pytest.approx(float(total), rel=FP32)
    assert report[0, 1] == 41
    for name, parameter in leaves.items():
        torch.testing.assert_close(parameter.main_grad, expected[name], rtol=FP32, atol=1e-6)


def test_the_report_is_per_data_set() -> None:
    torch.manual_seed(0)
    training = build_training(recipe(), IMAGE_TOKEN)
    (module,) = training.modules
    samples = [supervised(sample(i, 20), 3 + i) for i in range(3)]
    batch = pack(samples, padding=4)
    batch.segment_sources = torch.tensor([2, 0, 2, -1])
    report = run_batches(training.chunks, [batch], num_sources=3, forward_only=True)
    with torch.no_grad():
        first, second, third, _ = losses(module, batch).split([20, 20, 20, 4])
    assert report[:, 1].tolist() == [4, 0, 3 + 5]
    expected = [float(second.sum()), 0.0, float(first.sum() + third.sum())]
    assert report[:, 0].tolist() == pytest.approx(expected, rel=FP32)
    result = StepResult(report, None)
    assert result.supervised_tokens == 12
    assert result.loss == pytest.approx(sum(expected) / 12)


@pytest.mark.parametrize("kind", ["token_mean", "task_mean"])
@pytest.mark.parametrize("distributed", [False, True])
def test_a_step_without_labels_changes_nothing(kind: str, distributed: bool) -> None:
    """Its gradient is zero, but weight decay and the moments of the steps before would move the weights."""
    torch.manual_seed(0)
    optimizer = {"weight_decay": 0.1, "lr": 1e-2, "schedule": "constant"}
    parallel = {"use_distributed_optimizer": distributed}
    training = build_training(recipe(optimizer=optimizer, parallel=parallel), IMAGE_TOKEN)
    (module,) = training.modules
    tasks = TaskMean(torch.tensor([0, 1]), torch.tensor([1.0, 2.0]).double()) if kind == "task_mean" else None

    def step(count: int, largest: float | None = None) -> StepResult:
        training.scheduler.step(1)
        return train_step(training.chunks, training.optimizer, [share(1, 1, count)], 2, largest, tasks)

    def state() -> list[torch.Tensor]:
        moments = {} if distributed else training.optimizer.state_dict()["state"]
        assert distributed or moments
        found = list(module.parameters()) + [t for one in moments.values() for t in one.values()]
        return [t.detach().clone() for t in found if isinstance(t, torch.Tensor)]

    assert step(20).skipped is None
    before = state()
    assert not (share(1, 1, 0).labels != IGNORE_INDEX).any()
    result = step(0, largest=0.5)
    assert result.skipped == "no token has a label" and result.empty and result.supervised_tokens == 0
    assert math.isnan(result.loss) and result.grad_norm is None
    after = state()
    assert len(before) == len(after) and all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert step(20).skipped is None and not all(torch.equal(*pair) for pair in zip(before, state(), strict=True))


def test_steps_without_labels_are_not_in_the_mean_that_spikes_are_told_by(tmp_path: Path) -> None:
    """As 0 they would pull it down, and good steps would be refused from then on."""
    settings = recipe(training={"loss_spike_factor": 1.5, "max_skipped_steps": 2}).training
    progress = Progress()
    guard = StepGuard(settings, progress, tmp_path)

    def take(loss: float | None, skipped: str | None = None) -> None:
        report = torch.tensor([[0.0, 0.0] if loss is None else [4 * loss, 4.0]], dtype=torch.float64)
        guard.take(StepResult(report, None, "no token has a label" if loss is None else skipped), ["a"])
        progress.step += 1

    for _ in range(19):
        take(2.0)
        for _ in range(5):  # more in a row than max_skipped_steps, which is of steps that went wrong
            take(None)
    assert guard.largest_loss() is None  # 114 steps, and 19 of them have a loss
    take(2.0)
    assert guard.largest_loss() == pytest.approx(3.0)
    assert (progress.empty_steps, progress.skipped_steps, progress.running_loss_steps) == (95, 0, 20)
    assert Progress.from_json(json.loads(json.dumps(progress.to_json()))) == progress
    assert Progress.from_json({"step": 9, "mean_loss": 0.1}) == Progress(step=9)  # spoilt by an older version
    lines = [json.loads(line) for line in (tmp_path / SKIPPED_FILE).read_text().splitlines()]
    assert len(lines) == 95 and lines[0] == {"step": 2, "why": "no token has a label", "loss": None, "samples": ["a"]}
    # A step without labels between two that went wrong does not end their row.
    take(9.0, "the loss is above 3")
    take(None)
    take(9.0, "the loss is above 3")
    with pytest.raises(RuntimeError, match="3 steps in a row"):
        take(9.0, "the loss is above 3")


def test_gradients_do_not_pile_up_over_steps() -> None:
    def norms(count: int) -> list[float | None]:
        torch.manual_seed(0)
        training = build_training(recipe(optimizer={"lr": 1e-12}), IMAGE_TOKEN)
        batch = [share(1, 1, 20)]
        return [train_step(training.chunks, training.optimizer, batch, 1).grad_norm for _ in range(count)]

    first, second = norms(2)
    assert second == pytest.approx(first, rel=1e-4)
