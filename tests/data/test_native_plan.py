"""Pictures of their own size: tokens, grids and pixels are those of Transformers' processors (Qwen2-VL, GLM-4.1V).

The oracle is the processor's PIL variant. The other one, for which torchvision is needed, has the same ``smart_resize``
and resizes with the operation of torch that ``render_with_torch`` takes for the other decoders.
"""

from __future__ import annotations

import io
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import encode_image, smooth_image
from PIL import Image

from megavlm.data.batch import IGNORE_INDEX, make_pack
from megavlm.data.decode import GRAY
from megavlm.data.decoders import make_decoder
from megavlm.data.device_batch import make_batch
from megavlm.data.images import ImageError, lay_out
from megavlm.data.media import ImageShape, arrange
from megavlm.data.patches import patches_of, pictures_of
from megavlm.data.plans_native import NaflexPlan, NativePlan
from megavlm.data.read_pack import decode_pack

PLANS = {
    "transformers": NativePlan(448, 256),
    "published": NativePlan(448, 256, max_pixels=12845056),
    "qwen3": NativePlan(512, 256, patch=16, min_pixels=65536, max_pixels=16777216),
    "glm": NativePlan(336, 144, min_pixels=6272, max_pixels=4816896, enlarge=True),
    "glm_small": NativePlan(64, 4, patch=4, min_pixels=128, max_pixels=2048, enlarge=True),
    "small": NativePlan(64, 4, patch=4, merge=2, min_pixels=256, max_pixels=8192),
}


def processor(plan: NativePlan) -> Any:
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    frames = plan.temporal if plan.enlarge else 1  # GLM-4.1V's counts pixels of all frames of a patch
    return (Glm4vImageProcessorPil if plan.enlarge else Qwen2VLImageProcessorPil)(
        size={"shortest_edge": plan.min_pixels * frames, "longest_edge": plan.max_pixels * frames},
        patch_size=plan.patch, merge_size=plan.merge, temporal_patch_size=plan.temporal, do_rescale=False,
        do_normalize=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_tokens_of_500_sizes(name: str) -> None:
    plan, draw = PLANS[name], random.Random(name)
    theirs = processor(plan)
    for _ in range(500):
        long, ratio = (
            round(10 ** draw.uniform(0.5, 3.78)),
            draw.uniform(1, 3) if draw.random() < 0.8 else draw.uniform(1, 150),
        )
        sides = [long, max(1, round(long / ratio))]
        draw.shuffle(sides)
        width, height = sides
        layout = plan.plan(width, height)
        patches = theirs.get_number_of_image_patches(height, width, {})
        assert layout.patches is not None
        assert plan.pixels_of(layout)[0] == np.prod(layout.patches) == patches, sides
        assert layout.tokens == patches // plan.merge**2 == plan.features_of(layout)


@pytest.mark.parametrize("kind", ["pil", "simplejpeg", "dali"])
def test_pixels_and_grids(kind: str) -> None:
    """With PIL all pixels are equal; with the others within one level of 255 for 99.9 % of them."""
    pytest.importorskip({"pil": "PIL", "dali": "nvidia.dali"}.get(kind, kind))
    for name, sizes in {
        "small": [(30, 90), (200, 41), (64, 64), (3, 5)],
        "glm_small": [(30, 90), (200, 41), (3, 5)],
        "published": [(333, 250), (91, 640)],
    }.items():
        plan = PLANS[name]
        files = [encode_image(smooth_image(i, *size), quality=95, subsampling=0) for i, size in enumerate(sizes)]
        layouts = [lay_out([one], plan)[0] for one in files]
        decoded = make_decoder(kind).decode(files, plan, layouts)
        expected = processor(plan)([Image.open(io.BytesIO(one)).convert("RGB") for one in files], return_tensors="np")
        grid = arrange(plan, layouts).grid
        assert grid is not None and grid.tolist() == expected["image_grid_thw"].tolist()
        difference = np.abs(decoded.pixels.numpy().astype(int) - expected["pixel_values"].astype(int))
        assert not decoded.failed
        assert (difference <= (0 if kind == "pil" else 1)).mean() >= (1 if kind == "pil" else 0.999)


NAFLEX = {
    "published": NaflexPlan(256, 256, resample="bilinear", patch=16, merge=1, temporal=1),
    "many": NaflexPlan(256, 256, resample="bilinear", patch=16, merge=1, temporal=1, max_num_patches=1024),
    "odd": NaflexPlan(256, 256, resample="bilinear", patch=14, merge=1, temporal=1, max_num_patches=77),
    "one": NaflexPlan(256, 256, resample="bilinear", patch=16, merge=1, temporal=1, max_num_patches=1),
}


@pytest.mark.parametrize("name", NAFLEX)
def test_naflex_sizes_of_500_pictures(name: str) -> None:
    """Those of Transformers' processor of SigLIP 2; with merge 2 whole blocks within the same number of patches."""
    from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

    plan, draw = NAFLEX[name], random.Random(name)
    blocks = replace(plan, merge=2)
    for _ in range(500):
        long, ratio = round(10 ** draw.uniform(0.3, 3.78)), draw.uniform(1, 3 if draw.random() < 0.8 else 150)
        sides = [long, max(1, round(long / ratio))]
        draw.shuffle(sides)
        width, height = sides
        if max(sides) > 200 * min(sides):
            continue
        high, wide = get_image_size_for_max_num_patches(height, width, plan.patch, plan.max_num_patches)
        layout = plan.plan(width, height)
        assert layout.patches == (1, high // plan.patch, wide // plan.patch), sides
        assert layout.tokens == plan.features_of(layout) == plan.pixels_of(layout)[0] <= plan.max_num_patches
        if plan.max_num_patches >= 4:
            _, rows, columns = blocks.plan(width, height).patches or (0, 0, 0)
            assert rows % 2 == columns % 2 == 0 < rows * columns <= plan.max_num_patches


def test_naflex_pixels() -> None:
    """As its processor makes them with PIL, colour by colour."""
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    plan = NAFLEX["published"]
    files = [encode_image(smooth_image(i, *size), "PNG") for i, size in enumerate([(333, 250), (91, 640), (40, 30)])]
    decoded = make_decoder("pil").decode(files, plan, [lay_out([one], plan)[0] for one in files])
    theirs = Siglip2ImageProcessorPil(do_rescale=False, do_normalize=False)(
        [Image.open(io.BytesIO(one)).convert("RGB") for one in files], return_tensors="np"
    )
    expected = [
        one[: h * w].reshape(-1, 16, 16, 3).transpose(0, 3, 1, 2).reshape(h * w, -1)
        for one, (h, w) in zip(theirs["pixel_values"], theirs["spatial_shapes"].tolist(), strict=True)
    ]
    assert not decoded.failed
    assert np.array_equal(decoded.pixels.numpy().astype(int), np.concatenate(expected).astype(int))


def test_patches_go_back_to_pictures() -> None:
    plan = PLANS["small"]
    shown = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in ((16, 40), (8, 8))]
    flat = torch.cat([patches_of(one, plan) for one in shown])
    back = list(pictures_of(flat, [(1, 4, 10), (1, 2, 2)], plan))
    assert all(torch.equal(a, b) for a, b in zip(back, shown, strict=True))


def test_a_samples_budget_is_shared_by_its_pictures() -> None:
    plan = NativePlan(64, 4, patch=4, min_pixels=256, max_pixels=8192, total_pixels=8192)
    tokens = [plan.plan(2000, 1000, count).tokens for count in (1, 2, 4, 100)]
    assert [64 * one <= 8192 // count for one, count in zip(tokens, (1, 2, 4), strict=False)] == [True] * 3
    assert tokens == sorted(tokens, reverse=True) and tokens[0] > 2 * tokens[2]
    assert 64 * tokens[3] <= 256, "no less than min_pixels"
    assert plan.plan(2000, 1000, 1).tokens == PLANS["small"].plan(2000, 1000).tokens


def test_what_is_too_long_is_refused() -> None:
    for plan in PLANS.values():
        plan.plan(2000, 10)
        with pytest.raises(ImageError, match="over 200 times"):
            plan.plan(2001, 10)
        with pytest.raises(ImageError):
            plan.plan(0, 10)


def test_a_pack_with_a_broken_picture_and_one_without_any() -> None:
    plan = PLANS["small"]
    files = [encode_image(smooth_image(1, 40, 64), "PNG"), encode_image(smooth_image(2, 64, 24), "PNG")[:-200]]
    shapes = [ImageShape(40, 64), ImageShape(64, 24)]
    slots = [plan.plan(*shape).tokens for shape in shapes]
    segments = [[5, *[9] * count, 6, 7] for count in slots]
    pack = make_pack(
        segments,
        80,
        labels=segments,
        images=files,
        image_shapes=shapes,
        sample_keys=["d/a", "d/b"],
        sample_shards=["s"] * 2,
    )
    read = decode_pack(pack, make_decoder("pil"), plan, 9)
    assert [one.key for one in read.masked] == ["b"]
    second = int(pack.cu_seqlens[1])
    assert (pack.labels[second:] == IGNORE_INDEX).all() and (pack.labels[: second - 1] != IGNORE_INDEX).any()
    assert (read.pixels[-4 * slots[1] :] == GRAY).all() and not (read.pixels[: 4 * slots[0]] == GRAY).all()
    batch = make_batch(pack, read.pixels, torch.device("cpu"), read.arrangement)
    assert batch.image_grid is not None and batch.image_grid.tolist() == [[1, 16, 10], [1, 6, 16]]
    assert batch.num_views == batch.num_images == 2
    assert batch.image_index is None

    empty = decode_pack(make_pack([[1, 2]], 4), make_decoder("pil"), plan, 9)
    assert empty.pixels.shape == (0, 96)
    batch = make_batch(empty.pack, empty.pixels, torch.device("cpu"), empty.arrangement)
    assert batch.image_grid is None and batch.num_views == 0
