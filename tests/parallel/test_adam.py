"""Our AdamW takes PyTorch's steps and keeps FusedAdam's state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from megavlm.parallel.adam import AdamW

SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6}


def parameters() -> list[torch.nn.Parameter]:
    """Return equal parameters each time."""
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in ((4, 5), (7,), (3,))]


def groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    """Return two groups with settings of their own."""
    return [{"params": params[:2], "weight_decay": 0.3}, {"params": params[2:], "lr": 0.002, "weight_decay": 0.0}]


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    """Give equal gradients each time."""
    generator = torch.Generator().manual_seed(step + 1)
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_steps_equal_those_of_torch() -> None:
    mine, theirs = parameters(), parameters()
    ours, reference = AdamW(groups(mine), **SETTINGS), torch.optim.AdamW(groups(theirs), **SETTINGS)
    for step in range(6):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        for optimizer in (ours, reference):
            optimizer.param_groups[0]["lr"] = 0.01 * (step + 1)  # as a schedule does
            optimizer.step()
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-7)
    for one, other in zip(mine, theirs, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(ours.state[one][key], reference.state[other][key], rtol=0, atol=1e-7)


def test_the_state_has_the_layout_of_fused_adam() -> None:
    params = parameters()
    optimizer = AdamW(groups(params), **SETTINGS)
    set_gradients(params, 0)
    optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [1, 1]
    assert all(set(optimizer.state[p]) == {"exp_avg", "exp_avg_sq"} for p in params)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_loaded_state_goes_on_where_it_was(as_tensor: bool) -> None:
    params = parameters()
    optimizer = AdamW(groups(params), **SETTINGS)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    if as_tensor:
        for group in saved["param_groups"]:
            group["step"] = torch.tensor(group["step"])
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = AdamW(groups(resumed), **SETTINGS)
    other.load_state_dict(saved)
    for step in range(3, 5):
        for own, one in ((params, optimizer), (resumed, other)):
            set_gradients(own, step)
            one.step()
    for one_, other_ in zip(params, resumed, strict=True):
        assert torch.equal(one_, other_)


def test_a_group_may_be_empty_and_a_gradient_missing() -> None:
    params = parameters()
    before = params[1].detach().clone()
    optimizer = AdamW([{"params": []}, {"params": params}], **SETTINGS)
    set_gradients(params, 0)
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1], before)
    assert [group["step"] for group in optimizer.param_groups] == [1, 1]


def test_plain_adam_is_refused() -> None:
    with pytest.raises(ValueError, match="decoupled"):
        AdamW(parameters(), adam_w_mode=False)
