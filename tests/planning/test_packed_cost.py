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
from megavlm.architectures.context import BuildContext
from megavlm.architectures.cost import Kernels, Pictures, cost_of
from megavlm.architectures.towers.packed_vit import cost
from megavlm.config.architecture import architecture_of
from megavlm.config.load import load_recipe
from megavlm.config.schema import ParallelConfig, Recipe
from megavlm.families.presets import expand_presets
from megavlm.models.levels import connect, make_connector
from megavlm.parallel.state import process_groups
from megavlm.planning.layout import layout_of
from megavlm.planning.shares import share
from megavlm.planning.stage_flops import chunk_flops
from megavlm.planning.workload import assume_workload


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


CONNECTORS: dict[str, tuple[str, tuple[str, ...]]] = {
    "glm4_1v_9b": ("downsample_merger", ("model.connector.ffn_hidden_size=56",)),
    "qwen2_vl_7b": ("patch_merger", ()),
    "qwen2_5_vl_7b": ("patch_merger", ()),
    "qwen3_vl_8b": ("patch_merger", ("model.vision.deepstack_layers=[0,1]",)),
    "internvl3_8b": ("pixel_shuffle", ()),
}


@pytest.mark.parametrize("preset", CONNECTORS)
@pytest.mark.parametrize("learns", [True, False])
def test_costs_of_connectors_are_what_torch_counts_and_keeps(preset: str, learns: bool) -> None:
    """Operations and parameters exactly, with those of a deepstack's levels; kept bytes within 2 %."""
    name, words = CONNECTORS[preset]
    small = ("model.vision.hidden_size=96", "model.vision.num_layers=2", "model.language.hidden_size=48")
    model = recipe_of(preset, *small, *words).model
    assert architecture_of(model, "connector").name == name
    connector = make_connector(model, BuildContext(ParallelConfig()))
    connector.requires_grad_(learns)
    views = 1 if model.vision.packed else 2
    patches = 2 * 288 if model.vision.packed else model.vision.patches_per_image
    width = model.vision.feature_size * (1 + model.vision.deepstack)
    features, shown = torch.randn(patches, views, width).requires_grad_(), Pictures(2, patches * views, 0)
    counted = cost_of(model, "connector")
    with FlopCounterMode(display=False) as counter:
        connect(connector, features)
    assert counted.work(model, shown).total == counter.get_total_flops() > 0
    with saved_tensors(connector.parameters()) as saved:
        connect(connector, features)
    plain = Kernels(fused=False, number_bytes=4)
    assert counted.kept(model, 1, shown, plain, learns=learns) == pytest.approx(saved.bytes, rel=0.02)
    assert [one.elements for one in counted.parameters(model, 1)] == [p.numel() for p in connector.parameters()]


def recipe_of(preset: str, *words: str) -> Recipe:
    return load_recipe("qwen2_5_vl_7b/sft", [f'model={{"preset": "{preset}"}}', *words], expand_presets)


def test_a_plan_counts_the_square_of_each_picture() -> None:
    """One of 2048 x 1536 is resized to 2044 x 1540: 146 x 110 patches, within a budget that allows it."""
    recipe = recipe_of("qwen2_vl_7b", "model.image.max_pixels=4000000", "data.sequence_length=16384")
    load = assume_workload(recipe, images_per_pack=1.5, picture=(2048, 1536))
    assert load.pictures == Pictures(1.5, 1.5 * 146 * 110, 1.5 * (146 * 110) ** 2)
    layout = layout_of(recipe, 8)
    work = chunk_flops(recipe, layout, layout.chunks[0], tokens=16384, squared_lengths=1, images=load.seen)
    assert work.tower_attention * layout.tensor == 32 * 4 * 1280 * 1.5 * (146 * 110) ** 2


def test_a_plan_of_a_whole_tower_is_that_of_the_rank_with_most_patches() -> None:
    tower = ("model.vision.tensor_parallel=replicate", "parallel.tensor_model_parallel_size=2")
    recipe = recipe_of("qwen2_vl_7b", *tower)
    layout = layout_of(recipe, 2)
    grids = [(1, 4, 4), (1, 20, 30), (1, 2, 8), (1, 10, 10)]  # half of all patches is in the second
    for seen, expected in (
        (grids, Pictures(2, 616, 600**2 + 16**2)),
        ([], Pictures(0, 0, 0)),
        (Pictures(1.5, 300, 60_000), Pictures(1, 200, 40_000)),
        (Pictures(0.5, 100, 20_000), Pictures(0.5, 100, 20_000)),  # on average less than one: no more than there are
        (3, Pictures.alike(2, recipe.model.vision.grid)),
        (0.25, Pictures.alike(0.25, recipe.model.vision.grid)),
    ):
        ranks, found = share(recipe.model, "vision", layout, seen)
        assert ranks == 1 and found == expected
    assert share(recipe.model, "connector", layout, grids)[0] == 2
