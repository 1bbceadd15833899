"""The shorter forward pass of generation: the same logits where they are wanted, and the model as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from samples import build, gradients, pack, sample
from torch import Tensor

from megavlm.config.schema import ParallelConfig
from megavlm.data.device_batch import Batch
from megavlm.inference.quick import quick_layers
from megavlm.models.vlm import VisionLanguageModel
from megavlm.parallel.state import process_groups


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """Hold the groups of a single process while the tests run."""
    with process_groups(ParallelConfig(), seed=1234):
        yield


def logits(model: VisionLanguageModel, batch: Batch) -> Tensor:
    """[S or K, V] logits without gradients."""
    with torch.inference_mode():
        output = model(
            tokens=batch.tokens,
            position_ids=batch.position_ids,
            packed_seq_params=batch.packed_seq_params,
            images=batch.images,
        )
    return output[0]


def test_logits_are_those_of_the_whole_pass_at_the_wanted_positions() -> None:
    model = build().eval()
    batch = pack([sample(0, 23), sample(1, 17, 1), sample(2, 30, 3)])
    ends = torch.tensor([22, 39, 69])
    whole = logits(model, batch)
    with quick_layers([model], lambda: ends):
        got = logits(model, batch)
    assert got.shape == (3, whole.size(1))
    torch.testing.assert_close(got, whole[ends], rtol=0, atol=1e-5 * float(whole.abs().max()))
    torch.testing.assert_close(logits(model, batch), whole, rtol=0, atol=0)


def test_the_model_learns_as_before_also_after_an_error() -> None:
    model = build()
    batch = pack([sample(1, 17, 1)])
    before = gradients(model, batch)
    with pytest.raises(KeyError), quick_layers([model], lambda: torch.tensor([16])):
        raise KeyError
    assert not any("forward" in module.__dict__ for module in model.modules())
    after = gradients(model, batch)
    for name, gradient in before.items():
        if gradient is not None:
            torch.testing.assert_close(after[name], gradient, rtol=0, atol=0)
