"""What the parity cases leave out: interpolated positions beside a class token, and pixels as uint8."""

from __future__ import annotations

from typing import Any

import torch
from samples import recipe
from torch import Tensor, nn

from megavlm.architectures.positions import resize_table
from megavlm.config.architecture import VISION
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
