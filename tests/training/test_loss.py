"""The loss over tasks: against written-out numbers, against autograd, and at every layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import script
from samples import losses
from task_loss_cases import LAYOUTS, SOURCES, batches, recipe, run
from tiny import IMAGE_TOKEN

from megavlm.config.schema import ParallelConfig
from megavlm.data.batch import IGNORE_INDEX
from megavlm.data.device_batch import Batch
from megavlm.parallel.state import process_groups
from megavlm.training.build import build_training
from megavlm.training.loss import TaskMean, mean_loss, supervised_tokens, task_mean
from megavlm.training.step import StepResult, run_batches

FP32 = 1e-5


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    with process_groups(ParallelConfig(), seed=1):
        yield


def tasks(*weights: float, of: tuple[int, ...]) -> TaskMean:
    return TaskMean(torch.tensor(of), torch.tensor(weights, dtype=torch.float64))


def test_written_out_numbers() -> None:
    # Task 0: data sets 0 and 2, (6 + 3) / (4 + 2) = 1.5, weight 1. Task 1: data set 1, 40 / 10 = 4, weight 3.
    sums = torch.tensor([[6.0, 4], [40, 10], [3, 2]], dtype=torch.float64)
    both = tasks(1, 3, of=(0, 1, 0))
    assert mean_loss(sums, both) == pytest.approx((1 * 1.5 + 3 * 4) / 4)
    assert mean_loss(sums, None) == pytest.approx(49 / 16)
    # N w_t / (N_t sum w), with N = 16
    assert both.token_factors(sums[:, 1]).tolist() == pytest.approx([16 / 6 / 4, 16 / 10 * 3 / 4, 16 / 6 / 4])


def test_a_task_that_is_absent_has_no_share_in_the_weights() -> None:
    sums = torch.tensor([[6.0, 4], [0, 0], [40, 10]], dtype=torch.float64)
    three = tasks(1, 100, 3, of=(0, 1, 2))
    assert mean_loss(sums, three) == pytest.approx((1 * 1.5 + 3 * 4) / 4)
    assert three.token_factors(sums[:, 1]).isfinite().all()
    assert mean_loss(torch.zeros(3, 2, dtype=torch.float64), three) == 0.0


def test_equal_weights_by_tokens_are_the_mean_over_tokens() -> None:
    sums = torch.tensor([[6.0, 4], [40, 10], [3, 2]], dtype=torch.float64)
    assert mean_loss(sums, tasks(4, 10, 2, of=(0, 1, 2))) == pytest.approx(mean_loss(sums, None))


def test_a_recipe_names_its_tasks() -> None:
    found = task_mean(recipe())
    assert found is not None
    assert found.tasks_D.tolist() == [0, 1, 2, 1, 3]
    assert found.weights_T.tolist() == [1, 3, 0.25, 1]
    assert task_mean(recipe("token_mean")) is None


@pytest.mark.parametrize("step", [0, 1])
def test_gradients_are_those_of_the_weighted_mean_of_the_tasks(step: int) -> None:
    """Autograd on the formula, task by task, over plain per-token losses of the whole global batch."""
    torch.manual_seed(0)
    training = build_training(recipe(), IMAGE_TOKEN)
    (module,) = training.modules
    packs = batches(step)
    token_losses = torch.cat([losses(module, pack) for pack in packs])
    labelled = torch.cat([pack.labels[0] != IGNORE_INDEX for pack in packs])
    token_losses = token_losses * weights_of_tokens(packs)
    names = [source.get("task", source["path"]) for source in SOURCES]
    task_of = [names[i] if i >= 0 else "" for pack in packs for i in pack.token_sources.tolist()]
    weights = {"/captions": 1.0, "ocr": 3.0, "/rare": 0.25, "/never": 1.0}
    total, sum_of_weights, present = torch.zeros(()), 0.0, 0
    for name, weight in weights.items():
        own = labelled & torch.tensor([task == name for task in task_of])
        if own.any():
            total = total + weight * token_losses[own].mean()
            sum_of_weights, present = sum_of_weights + weight, present + 1
    assert present == (3 if step == 0 else 2)
    expected_loss = total / sum_of_weights
    leaves = {name: p for name, p in module.named_parameters() if p.requires_grad}
    expected = dict(zip(leaves, torch.autograd.grad(expected_loss, list(leaves.values())), strict=True))

    for chunk in training.chunks:
        chunk.zero_grad_buffer()
    report = run_batches(training.chunks, packs, len(SOURCES), tasks=task_mean(recipe()))
    assert StepResult(report, None, tasks=task_mean(recipe())).loss == pytest.approx(float(expected_loss), rel=FP32)
    assert report[:, 1].tolist() == supervised_tokens(packs, len(SOURCES)).tolist()
    for name, parameter in leaves.items():
        torch.testing.assert_close(parameter.main_grad, expected[name], rtol=FP32, atol=1e-6)


def weights_of_tokens(packs: list[Batch]) -> torch.Tensor:
    found = [torch.ones_like(p.labels[0]) if p.loss_weights is None else p.loss_weights[0] for p in packs]
    return torch.cat([one.float() for one in found])


def test_a_weight_multiplies_a_loss_and_not_the_count() -> None:
    """Megatron-SWIFT's definition: sum(loss * scale * mask) / sum(mask); a weight of 1 everywhere changes nothing."""
    torch.manual_seed(0)
    training = build_training(recipe("token_mean"), IMAGE_TOKEN)
    packs = batches(0)
    token_losses = torch.cat([losses(training.modules[0], pack) for pack in packs]).detach()
    labelled = torch.cat([pack.labels[0] != IGNORE_INDEX for pack in packs])
    expected = (token_losses * weights_of_tokens(packs))[labelled].sum() / labelled.sum()
    report = run_batches(training.chunks, packs, len(SOURCES), forward_only=True)
    assert mean_loss(report, None) == pytest.approx(float(expected), rel=FP32)
    assert int(report[:, 1].sum()) == int(labelled.sum())
    assert float(expected) != pytest.approx(float(token_losses[labelled].mean()), rel=1e-3)
    ones = [replace(pack, loss_weights=torch.ones_like(pack.labels).float()) for pack in packs]
    none = [replace(pack, loss_weights=None) for pack in packs]
    reports = [run_batches(training.chunks, one, len(SOURCES), forward_only=True) for one in (ones, none)]
    assert torch.equal(*reports)


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    """Return losses and gradient norms at every layout, and of this process, from equal weights."""
    root = tmp_path_factory.mktemp("tasks")
    weights, out = root / "step-00000000", root / "results.json"
    here = {"alone": run(weights), "token mean": run(weights, "token_mean")}
    script(Path(__file__).with_name("task_loss_cases.py"), weights, out, world=4)
    return json.loads(out.read_text()) | here


@pytest.mark.long
@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_equals_one_process(layout: str, everywhere: dict[str, dict[str, list[float]]]) -> None:
    expected, got = everywhere["alone"], everywhere[layout]
    assert got["tokens"] == expected["tokens"]
    assert got["loss"] == pytest.approx(expected["loss"], rel=FP32)
    assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=FP32)


@pytest.mark.long
@pytest.mark.dist
def test_it_is_another_loss_than_the_mean_over_tokens(everywhere: dict[str, dict[str, list[float]]]) -> None:
    by_task, by_token = everywhere["alone"], everywhere["token mean"]
    assert by_task["tokens"] == by_token["tokens"]
    assert by_task["grad_norm"][0] != pytest.approx(by_token["grad_norm"][0], rel=1e-2)
