"""What the parity cases leave out: interpolated positions beside a class token, pixels as uint8, several sizes."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from samples import recipe
from saved_tensors import saved_tensors
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megavlm.architectures.cost import Kernels, Pictures
from megavlm.architectures.positions import resize_table
from megavlm.architectures.towers.vit import cost
from megavlm.config.architecture import VISION
from megavlm.config.schema import ParallelConfig
from megavlm.models.build import build_context

CLIP = {"class_token": True, "layernorm_epsilon": 1e-5}
HALF = {"image_mean": (0.5, 0.4, 0.3), "image_std": (0.5, 0.25, 0.2)}


def tower(**vision: Any) -> nn.Module:
    """Build the tiny tower (32 pixels, patches of 8) with the same random weights each time."""
    torch.manual_seed(0)
    made = recipe(vision=vision)
    return VISION.find("tiny_vit").build(made.model.vision, build_context(made))


def pixels(side: int = 32) -> Tensor:
    """Return two random pictures."""
    return torch.randint(0, 256, (2, 3, side, side), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_a_class_token_keeps_its_position_when_the_others_are_interpolated() -> None:
    small, large = tower(positional_grid=3, **CLIP), tower(positional_grid=4, **CLIP)
    state = small.state_dict()
    table = state["positional_embedding"]
    state["positional_embedding"] = torch.cat([table[:1], resize_table(table[1:], 4)])
    large.load_state_dict(state)
    torch.testing.assert_close(small(pixels()), large(pixels()), rtol=0, atol=0)


def test_a_class_token_is_seen_by_the_patches_and_is_not_among_them() -> None:
    model = tower(**CLIP)
    before = model(pixels())
    assert before.shape == (16, 2, 48)
    with torch.no_grad():
        model.class_embedding.copy_(model.class_embedding.flip(0))
    assert (model(pixels()) - before).abs().amax(dim=(1, 2)).min() > 1e-4


def test_uint8_pixels_are_normalised_with_the_recipes_statistics() -> None:
    model = tower(**HALF)
    mean, std = (torch.tensor(HALF[key], dtype=torch.float64).view(3, 1, 1) for key in ("image_mean", "image_std"))
    expected = model(((pixels().double() / 255 - mean) / std).float())
    torch.testing.assert_close(model(pixels()), expected, rtol=0, atol=1e-5)


def test_pixels_that_fill_no_patch_make_no_difference() -> None:
    model, larger = tower(), tower(image_size=37)
    torch.testing.assert_close(larger(pixels(37)), model(pixels(37)[..., :32, :32]), rtol=0, atol=1e-6)


def s2(model: nn.Module, pictures: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Return [P, N, L * W] as S2's public code does (bfshi/scaling_on_scales, ``s2wrapper/core.py``; arXiv 2403.13044).

    Each size by itself: resized bicubically, cut into squares that are stacked along the batch, encoded, put together,
    and resized to the first size's map by area.
    """
    tile, images, found = sides[0], len(pictures), []
    for side in sides:
        k = side // tile
        x = F.interpolate(pictures, size=(side, side), mode="bicubic")
        cut = [x[:, :, i * tile : (i + 1) * tile, j * tile : (j + 1) * tile] for i in range(k) for j in range(k)]
        out = model(torch.cat(cut)).permute(1, 2, 0)
        grid = math.isqrt(out.size(2))
        out = out.unflatten(2, (grid, grid))
        rows = [
            torch.cat([out[(i * k + j) * images : (i * k + j + 1) * images] for j in range(k)], -1) for i in range(k)
        ]
        whole = torch.cat(rows, -2)
        found.append(F.interpolate(whole, size=(grid, grid), mode="area"))
    return torch.cat(found, 1).flatten(2).permute(2, 0, 1)


@pytest.mark.parametrize("sides", [(32, 64, 96), (27, 54), (32,), (16, 64)])
@pytest.mark.parametrize("more", [{}, CLIP])
def test_pictures_are_seen_at_several_sizes(sides: tuple[int, ...], more: dict[str, Any]) -> None:
    """27 pixels hold three patches of 8, and 3 are left out of each tile."""
    plain, several = tower(image_size=sides[0], **more), tower(image_size=sides[-1], s2_scales=sides, **more)
    several.load_state_dict(plain.state_dict())
    side = sides[-1]
    pictures = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))
    got, expected = several(pictures), s2(plain, pictures, sides)
    assert got.shape == ((sides[0] // 8) ** 2, 2, 48 * len(sides))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(3))
    for out in (got, expected):
        (out * weights).sum().backward()
    for (name, mine), theirs in zip(several.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_cost_counts_every_tile(checkpointing: bool) -> None:
    sides = {"image_size": 96, "s2_scales": (32, 64, 96), "gradient_checkpointing": checkpointing}
    model, vision = tower(**sides), recipe(vision=sides).model.vision
    shown = Pictures.alike(2, vision.grid)
    pictures = torch.randn(2, 3, 96, 96)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pictures)
    table = 2 * vision.positional_grid**2 * vision.patches_per_image * vision.hidden_size
    once = table * int(vision.positional_grid**2 != vision.patches_per_image)
    assert cost.work(vision, shown).total == counter.get_total_flops() - once
    with saved_tensors(model.parameters()) as saved:
        model(pictures)
    plain = Kernels(fused=False, number_bytes=4)
    assert cost.kept(vision, 1, shown, plain) == pytest.approx(saved.bytes, rel=0.02)
    assert cost.parameters(vision, 1) == cost.parameters(replace(vision, s2_scales=None, image_size=32), 1)


@pytest.mark.parametrize(
    ("vision", "line"),
    [
        ({"s2_scales": (32, 64)}, r"s2_scales: \[32, 64\]; the last must be model.vision.image_size \(96\)"),
        ({"s2_scales": (64, 96)}, "each must be larger than the one before it and a multiple of the first"),
        ({"s2_scales": (96, 32)}, "each must be larger"),
        ({"s2_scales": (4, 96)}, "s2_scales: 4 is smaller than one patch"),
        (
            {"s2_scales": (32, 96), "feature_layers": (0, 2), "num_layers": 2},
            "s2_scales: goes with the features of the",
        ),
    ],
)
def test_sizes_that_do_not_go_together_are_named(vision: dict[str, Any], line: str) -> None:
    own = recipe(vision={"image_size": 96, **vision}).model.vision
    (found,) = VISION.find("tiny_vit").architecture.rules(own, ParallelConfig())
    assert re.search(line, found), found


def test_bunnys_tower_makes_what_bunny_has() -> None:
    """Bunny 1.1: SigLIP at 384, 768 and 1152 pixels; 729 features of 3456 numbers."""
    sizes = {"image_size": 1152, "s2_scales": (384, 768, 1152), "num_layers": 26, "post_layernorm": False}
    own = recipe(model={"preset": "tiny", "vision": {"preset": "siglip_so400m_14_384", **sizes}}).model.vision
    assert (own.patches_per_image, own.feature_size, own.tiles) == (729, 3456, 14)
    assert not list(VISION.find("siglip_so400m_14_384").architecture.rules(own, ParallelConfig()))
