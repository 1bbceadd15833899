"""The loss is the mean per supervised token of the global batch, however it is spread; no spread hangs."""

from __future__ import annotations

import json
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
    script(Path(__file__).with_name("step_cases.py"), out, world=2, timeout=240)
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


def test_a_step_with_nothing_to_learn_changes_nothing() -> None:
    torch.manual_seed(0)
    training = build_training(recipe(optimizer={"weight_decay": 0.0}), IMAGE_TOKEN)
    (module,) = training.modules
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    batch = share(1, 1, 0)
    assert not (batch.labels != IGNORE_INDEX).any()
    training.scheduler.step(1)
    result = train_step(training.chunks, training.optimizer, [batch], num_sources=1)
    assert (result.loss, result.supervised_tokens, result.grad_norm) == (0.0, 0, 0.0)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_gradients_do_not_pile_up_over_steps() -> None:
    def norms(count: int) -> list[float | None]:
        torch.manual_seed(0)
        training = build_training(recipe(optimizer={"lr": 1e-12}), IMAGE_TOKEN)
        batch = [share(1, 1, 20)]
        return [train_step(training.chunks, training.optimizer, batch, 1).grad_norm for _ in range(count)]

    first, second = norms(2)
    assert second == pytest.approx(first, rel=1e-4)
