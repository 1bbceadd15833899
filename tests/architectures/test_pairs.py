"""Two towers that see one picture compute what is published, at any layout; costs, rates and freezing of each."""

from __future__ import annotations

import pair_cases as cases
import pytest
import torch
from saved_tensors import saved_tensors
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megavlm.architectures.cost import Kernels, Pictures, cost_of


@pytest.mark.parametrize("name", cases.CASES)
def test_a_pair_and_its_connector_are_what_is_published(name: str) -> None:
    cases.compare(name)


@pytest.mark.parametrize("name", cases.MODELS)
@pytest.mark.parametrize("frozen", [None, "low", "high"])
def test_costs_are_what_torch_counts_and_keeps(name: str, frozen: str | None) -> None:
    """Operations and parameters exactly; kept bytes within 2 %; a frozen tower keeps nothing."""
    made = cases.made_recipe(name, frozen_tower=frozen)
    (tower, connector), model = cases.built(made), made.model
    vision = model.vision
    seen, plain = Pictures.alike(2, vision.grid), Kernels(fused=False, number_bytes=4)
    pixels = torch.randint(0, 256, (2, *vision.pixel_shape), dtype=torch.uint8)
    x = pixels
    for part, module in (("vision", tower), ("connector", connector)):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module(x)
        with saved_tensors(module.parameters()) as saved:
            features = module(x)
        own = vision if part == "vision" else model
        cost = cost_of(model, part)
        assert cost.work(own, seen).total == counter.get_total_flops()
        found = cost.parameters(own, 1)
        held = sorted((p.numel(), not p.requires_grad) for p in module.parameters())
        assert sorted(found) == held
        learns = {} if part == "vision" else {"learns": True}
        assert cost.kept(own, 1, seen, plain, **learns) == pytest.approx(saved.bytes, rel=0.02), part
        x = features.detach().requires_grad_()
