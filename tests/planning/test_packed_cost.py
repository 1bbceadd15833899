"""Costs of towers for pictures of any size, and of the patch merger, are what torch counts and keeps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from packed_cases import PACKED, built, model_of
from saved_tensors import saved_tensors
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megavlm.architectures.connectors.patch_merger import cost as merger
from megavlm.architectures.cost import Kernels, Pictures
from megavlm.architectures.towers.packed_vit import cost
from megavlm.config.schema import ParallelConfig
from megavlm.parallel.state import process_groups


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """Hold the groups of a single process."""
    with process_groups(ParallelConfig(), seed=1):
        yield


@pytest.mark.parametrize("name", PACKED)
def test_costs_are_what_torch_counts_and_keeps(name: str) -> None:
    """Operations exactly, of pictures whose sides are whole windows; kept bytes within 2 %."""
    ours, connector, _ = built(name)
    grid, plain = torch.tensor([[1, 12, 24], [1, 24, 12]]), Kernels(fused=False, number_bytes=4)
    shown = Pictures(2, 576, 2 * 288**2)
    pixels = torch.zeros(576, ours.settings.patch_values, dtype=torch.uint8)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        ours(pixels, grid)
    assert cost.work(ours.settings, shown).total == counter.get_total_flops()
    with saved_tensors(ours.parameters()) as saved:
        features = ours(pixels, grid)
    assert cost.kept(ours.settings, 1, shown, plain) == pytest.approx(saved.bytes, rel=0.02)
    if connector is not None:
        with saved_tensors(connector.parameters()) as saved:
            connector(features.detach().requires_grad_())
        model = model_of(name)
        assert merger.kept(model, 1, shown, plain, learns=True) == pytest.approx(saved.bytes, rel=0.02)
        sizes = sorted(one.elements for one in merger.parameters(model, 1))
        assert sizes == sorted(p.numel() for p in connector.parameters())
