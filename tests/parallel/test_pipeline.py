"""The runner of micro-batches: what it returns, what it leaves alone, and how it fills up an interleaved schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_recipe
from torch import Tensor, nn

from megavlm.parallel import pipeline
from megavlm.parallel.state import process_groups


class Chunk(nn.Module):
    """Parts that may be in different modes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1, 1), nn.Dropout(0.5)])


@pytest.fixture
def chunk() -> Chunk:
    chunk = Chunk().train()
    chunk.layers[0].eval()  # a frozen part may be in evaluation mode while the rest is trained
    return chunk


def modes(chunk: Chunk) -> list[bool]:
    return [module.training for module in chunk.modules()]


def test_evaluating_leaves_each_module_as_it_was_also_after_an_error(chunk: Chunk) -> None:
    before = modes(chunk)
    assert set(before) == {True, False}
    with pipeline.evaluating([chunk]):
        assert not any(modes(chunk)) and not torch.is_grad_enabled()
    assert modes(chunk) == before and torch.is_grad_enabled()
    with pytest.raises(OSError, match="the disk is gone"), pipeline.evaluating([chunk]):
        raise OSError("the disk is gone")
    assert modes(chunk) == before and torch.is_grad_enabled()


@pytest.mark.parametrize("count", [1, 3, 4])
def test_an_interleaved_schedule_is_filled_up_without_taking_a_result_twice(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron-Core's schedule is stood in for here: that it wants a multiple of the stages is its own rule."""
    ran: list[int] = []

    def schedule(**given: Any) -> list[Any]:
        assert given["num_microbatches"] % 2 == 0 and given["forward_only"] and not torch.is_grad_enabled()
        found = []
        for iterator, model in zip(given["data_iterator"], given["model"], strict=True):
            made = [given["forward_step_func"](iterator, model) for _ in range(given["num_microbatches"])]
            found = [take(output, non_loss_data=True) for output, take in made]
            assert next(iterator, None) is None
        return found

    def step(model: str, request: int) -> tuple[Tensor, Any]:
        def take(output: Tensor) -> int:
            ran.append(request)
            return int(output) * 10

        return torch.tensor(request), take

    monkeypatch.setattr(pipeline, "get_forward_backward_func", lambda: schedule)
    monkeypatch.setattr(pipeline.mpu, "get_pipeline_model_parallel_world_size", lambda: 2)
    assert pipeline.run(["early", "late"], range(count), step, 8) == [10 * i for i in range(count)]
    assert ran == [*range(count)] * 2


def test_nothing_to_run_is_nothing() -> None:
    with process_groups(tiny_recipe().parallel, 1):
        assert pipeline.run([None], [], lambda model, request: pytest.fail("ran"), 8) == []
        assert pipeline.from_last_stage(torch.ones(2)).tolist() == [1.0, 1.0]
