"""Experts' gradients are written where nothing was zeroed, and found once: the same bits as by Megatron-Core's ways."""

from __future__ import annotations

from collections.abc import Sequence

import expert_run_cases as cases
import pytest
import torch
from tiny import IMAGE_TOKEN
from torch import Tensor

from megavlm.config.schema import ParallelConfig
from megavlm.layers.expert_products import is_stale
from megavlm.parallel.state import process_groups
from megavlm.training import build
from megavlm.training.build import TrainingModel, build_training
from megavlm.training.gradients import zero_stale
from megavlm.training.step import train_step

MANY = cases.ALL | {"num_moe_experts": 64, "num_layers": 2}
"""Experts that no token of a pack meets, and some that none of a step meets."""


def stale_of(training: TrainingModel) -> list[torch.nn.Parameter]:
    return [p for module in training.modules for p in module.parameters() if is_stale(p)]


def trained(monkeypatch: pytest.MonkeyPatch, without: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return the weights behind two steps; numbers of another step that are left in the buffers are not finite."""
    recipe = cases.recipe_of(MANY)
    with monkeypatch.context() as patch, process_groups(ParallelConfig(), seed=3):
        for name in without:
            patch.setattr(build, name, lambda _: None)
        training = build_training(recipe, IMAGE_TOKEN)
        (chunk,) = training.chunks
        for step in range(2):
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                buffer.grad_data.fill_(float("nan"))
            batches = cases.batches_of(recipe, step)
            assert len(batches) > 1, "the second one is added"
            training.scheduler.step(1)
            assert train_step(training.chunks, training.optimizer, batches, num_sources=1).skipped is None
            assert not stale_of(training)
        return {name: p.detach().clone() for name, p in training.modules[0].named_parameters()}


def test_weights_are_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trained(monkeypatch, without=["leave_to_experts", "keep_places"])
    ours = trained(monkeypatch)
    assert all(torch.equal(ours[name], one) for name, one in plain.items())


def test_what_no_pass_has_written_is_zeroed_in_the_end() -> None:
    """Parts that are left out are the experts' and no others; a gradient of zero where no backward pass was."""
    recipe = cases.recipe_of(MANY)
    with process_groups(ParallelConfig(), seed=3):
        training = build_training(recipe, IMAGE_TOKEN)
        (chunk,) = training.chunks
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            buffer.grad_data.fill_(7.0)
        chunk.zero_grad_buffer()
        named = dict(training.modules[0].named_parameters())
        left = {name for name, p in named.items() if is_stale(p)}
        assert left == {name for name in named if "local_experts" in name} and len(left) == 2 * 2 * 64
        for name, parameter in named.items():
            if parameter.requires_grad:
                assert bool((parameter.main_grad == (7.0 if name in left else 0.0)).all()), name
        zero_stale(chunk)
        assert not stale_of(training)
        assert not any(p.main_grad.any() for p in named.values() if p.requires_grad)
