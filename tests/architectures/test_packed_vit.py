"""Towers for pictures of any size compute what Transformers' compute, packed as alone; wrong grids are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from packed_cases import GRID, PACKED, PATCH, WIDTH, built, compare_packed, patches
from pydantic import ValidationError
from samples import recipe

from megavlm.architectures.cost import Pictures
from megavlm.architectures.towers.packed_vit import cost, geometry
from megavlm.config.checks import check_recipe
from megavlm.config.errors import UserError


@pytest.mark.parametrize("name", PACKED)
def test_equals_the_published_tower(name: str) -> None:
    compare_packed(name)


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl", "rice"])
def test_packed_equals_alone(name: str) -> None:
    ours, _, _ = built(name)
    pixels, counts = patches(name), GRID.prod(1).tolist()
    with torch.no_grad():
        packed = ours(pixels, GRID)
        alone = [ours(part, one[None]) for part, one in zip(pixels.split(counts), GRID, strict=True)]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_uint8_is_normalised_by_colour_and_layers_can_be_recomputed() -> None:
    ours, _, _ = built("rice")
    raw = torch.randint(0, 256, patches("rice").shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    mean, std = (np.array(value, np.float32) for value in (ours.settings.image_mean, ours.settings.image_std))
    pixels = raw.numpy().reshape(len(raw), 3, -1) / np.float32(255)
    wanted = torch.from_numpy(((pixels - mean[:, None]) / std[:, None]).reshape(len(raw), -1).astype(np.float32))
    torch.testing.assert_close(ours(raw, GRID), ours(wanted, GRID), rtol=1e-5, atol=1e-5)

    def gradients() -> dict[str, torch.Tensor]:
        ours.zero_grad()
        ours(wanted, GRID).square().sum().backward()
        return {name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None}

    plain = gradients()
    ours.settings = ours.settings.__class__(**{**vars(ours.settings), "gradient_checkpointing": True})
    again = gradients()
    assert plain.keys() == again.keys() == dict(ours.named_parameters()).keys()
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-5)


def test_a_grid_that_is_not_that_of_the_patches_is_refused() -> None:
    ours, _, _ = built("qwen2-vl")
    for grid in (GRID[:-1], torch.tensor([[1, 3, 4]]), torch.tensor([[0, 2, 2]]), GRID.reshape(-1)):
        with pytest.raises(ValueError, match=r"patches|grid"):
            ours(patches("qwen2-vl"), grid)


def test_windows_are_the_published_ones() -> None:
    """As written in Qwen2.5-VL: the grid of blocks is padded to whole windows, and what is padding is dropped."""
    for rows, columns, side in ((5, 7, 3), (3, 6, 3), (1, 1, 4), (8, 2, 4)):
        found = geometry.windows([(1, 2 * rows, 2 * columns)], 2, side)
        padded = np.full((-(-rows // side) * side, -(-columns // side) * side), -1)
        padded[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
        order, lengths = [], []
        for top in range(0, rows, side):
            for left in range(0, columns, side):
                own = padded[top : top + side, left : left + side].ravel()
                order += own[own >= 0].tolist()
                lengths.append(4 * int((own >= 0).sum()))
        assert found.order.tolist() == order and found.lengths == lengths


@pytest.mark.parametrize("name", PACKED)
def test_cost_counts_what_is_built(name: str) -> None:
    ours, _, _ = built(name)
    sizes = sorted(one.elements for one in cost.parameters(ours.settings, 1))
    assert sizes == sorted(p.numel() for p in ours.parameters())


def test_attention_costs_what_pictures_and_windows_cost() -> None:
    whole, windowed = built("qwen2-vl")[0].settings, built("qwen2.5-vl")[0].settings
    large, small = (Pictures.alike(count, (side, side)) for count, side in ((1, 64), (16, 16)))
    assert large.patches == small.patches
    assert cost.work(whole, large).attention == 16 * cost.work(whole, small).attention
    own = cost.work(windowed, large)
    assert own.attention == 4 * WIDTH * large.patches * (large.patches + 2 * 36)


@pytest.mark.parametrize(
    ("vision", "line"),
    [
        ({"window_size": PATCH}, "model.vision.window_size: 4 pixels are less than a block of patches"),
        ({"window_size": 0}, "model.vision.window_size"),
        ({"full_attention_layers": [0]}, "model.vision.full_attention_layers"),
        ({"window_size": 32, "full_attention_layers": [3]}, "model.vision.full_attention_layers"),
        ({"class_token": True, "window_size": 32}, "model.vision.class_token"),
        ({"hidden_size": 24, "num_attention_heads": 4}, "heads of 6 have no angles"),
        ({"spatial_merge_size": 3}, "model.connector.merge_size: 2 is not model.vision.spatial_merge_size"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(vision: dict[str, Any], line: str) -> None:
    tree = {
        "preset": "qwen2_vl_vit", "patch_size": PATCH, "hidden_size": WIDTH, "num_layers": 3, "num_attention_heads": 4,
        "ffn_hidden_size": 64, **vision,
    }  # fmt: skip
    with pytest.raises((UserError, ValidationError), match=line):
        check_recipe(recipe(
            model={
                "preset": "tiny", "vision": tree, "connector": {"preset": "patch_merger"}, "image": {"kind": "native"},
            }
        ))  # fmt: skip


def test_squares_and_pictures_of_any_size_do_not_mix() -> None:
    tower = {
        "preset": "qwen2_vl_vit", "patch_size": PATCH, "hidden_size": WIDTH, "num_layers": 3, "num_attention_heads": 4,
        "ffn_hidden_size": 64,
    }  # fmt: skip
    with pytest.raises(
        (UserError, ValidationError), match=r"model.image.kind: the tower 'qwen2_vl_vit' takes pictures of any size"
    ):
        check_recipe(recipe(model={"preset": "tiny", "vision": tower, "connector": {"preset": "patch_merger"}}))
    with pytest.raises((UserError, ValidationError), match=r"model.image.kind: native needs a tower"):
        check_recipe(recipe(model={"preset": "tiny", "image": {"kind": "native"}}))
    with pytest.raises(
        (UserError, ValidationError), match=r"model.connector.preset: patch_merger takes patches in blocks"
    ):
        check_recipe(recipe(model={"preset": "tiny", "connector": {"preset": "patch_merger"}}))
