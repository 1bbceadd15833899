"""ConvNeXt and SAM's tower compute what Transformers' classes do, at any layout; their costs are what torch counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import convolution_cases as cases
import pytest
import torch
from pydantic import TypeAdapter
from saved_tensors import saved_tensors
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import ConvNextConfig, ConvNextModel, SamVisionConfig, SamVisionModel

from megavlm.architectures.context import BuildContext
from megavlm.architectures.cost import Kernels, Pictures
from megavlm.architectures.towers.convnext import cost as convnext_cost
from megavlm.architectures.towers.sam import cost as sam_cost
from megavlm.config.architecture import VISION
from megavlm.config.schema import ParallelConfig, Recipe


@pytest.mark.parametrize("name", cases.CONVNEXT)
def test_convnext_is_transformers(name: str) -> None:
    cases.compare_convnext(name)


@pytest.mark.parametrize("name", cases.SAM)
def test_sam_is_transformers(name: str) -> None:
    cases.compare_sam(name)


@pytest.mark.parametrize("name", cases.SAM)
def test_costs_of_sam_are_what_torch_counts_and_keeps(name: str) -> None:
    costs_are_counted(cases.sam_recipe(name), sam_cost)


@pytest.mark.parametrize("name", cases.CONVNEXT)
def test_costs_of_convnext_are_what_torch_counts_and_keeps(name: str) -> None:
    costs_are_counted(cases.convnext_recipe(name), convnext_cost)


def costs_are_counted(made: Recipe, cost: Any) -> None:
    """Operations and parameters exactly; kept bytes within 2 %."""
    vision, tower = made.model.vision, cases.built(made)
    pictures, shown = Pictures.alike(2, vision.grid), torch.randn(2, 3, vision.image_size, vision.image_size)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tower.eval()(shown)  # nothing is recomputed
    tower.train()
    assert cost.work(vision, pictures).total == counter.get_total_flops()
    assert [one.elements for one in cost.parameters(vision, 1)] == [p.numel() for p in tower.parameters()]
    with saved_tensors(tower.parameters()) as saved:
        tower(shown)
    assert cost.kept(vision, 1, pictures, Kernels(False, 4)) == pytest.approx(saved.bytes, rel=0.02)


def test_published_sizes() -> None:
    """Parameters of Transformers' classes at the published shapes, without the heads that are not built."""
    with torch.device("meta"):
        sam = SamVisionModel(SamVisionConfig())
        config = ConvNextConfig(depths=(3, 3, 27, 3), hidden_sizes=(192, 384, 768, 1536))
        convnext: Any = ConvNextModel(config)
        del convnext.layernorm  # behind its pooling
    count = sum(p.numel() for p in sam.parameters())
    halves = 9 * 256 * 512 + 9 * 512 * 1024
    neck = sum(p.numel() for p in sam.vision_encoder.neck.parameters())
    wanted = {
        "sam_vit_b_1024": (count + halves, (16**2, 1024)),
        "deepseek_vl_sam_b_1024": (count + halves + neck + 1, (24**2, 1024)),
        "openclip_convnext_l_d_768": (sum(p.numel() for p in convnext.parameters()), (192**2, 2880)),
    }
    for name, (parameters, shape) in wanted.items():
        found = VISION.find(name)
        vision = TypeAdapter(found.architecture.config).validate_python({"preset": name, **found.values})
        assert not list(found.architecture.rules(vision, ParallelConfig(tensor_model_parallel_size=4)))
        with torch.device("meta"):
            tower = found.build(vision, BuildContext(ParallelConfig(), initialize=False))
        assert sum(p.numel() for p in tower.parameters()) == parameters
        assert (vision.patches_per_image, vision.feature_size) == shape


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"preset": "convnext", "image_size": 36}, "image_size: 36 is not a multiple of 16, one position of the last"),
        ({"preset": "convnext", "depths": (1, 2)}, "are not a number above 0 for each stage"),
        ({"preset": "convnext", "feature_stages": (2, 1)}, "feature_stages: [2, 1] are not rising numbers from 1 on"),
        ({"preset": "convnext", "feature_stages": (1, 2)}, "that end with 3, the last stage"),
        ({"preset": "sam_vit", "image_size": 33}, "image_size: 33 is not divisible by model.vision.patch_size"),
        ({"preset": "sam_vit", "global_layers": (3,)}, "global_layers: [3] are not all layers from 0 to 2"),
        ({"preset": "sam_vit", "second_neck_layer": 3}, "second_neck_layer: 3 is not a layer from 0 to 2"),
    ],
)
def test_keys_that_do_not_go_together_are_one_line(keys: dict[str, Any], line: str) -> None:
    made = (cases.convnext_recipe("last") if keys["preset"] == "convnext" else cases.sam_recipe("plain")).model.vision
    (found,) = VISION.find(keys["preset"]).architecture.rules(replace(made, **keys), ParallelConfig())
    assert line in found
