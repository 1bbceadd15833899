"""Image plans against Transformers' own processors (5.23): views, boxes, tokens, and where each feature goes."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megavlm.data.image_header import ImageError
from megavlm.data.media import ImageLayout, ImagePlan, arrange
from megavlm.data.plans_single import CropPlan, PadPlan, SquashPlan
from megavlm.data.plans_slices import SlicesPlan
from megavlm.data.plans_tiles import AnyresMaxPlan, AnyresPlan, DynamicTilesPlan
from megavlm.data.render import render_with_pil

transformers = pytest.importorskip("transformers")

SIDE, FEATURES = 42, 3  # 3 x 3 features of a tile: everything as with 336 pixels, and quick
PINPOINTS = tuple((rows * SIDE, columns * SIDE) for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)))
MANY = tuple((rows * SIDE, columns * SIDE) for rows in range(1, 7) for columns in range(1, 7))


def sizes(count: int = 500) -> list[tuple[int, int]]:
    """Widths and heights: of all proportions, and edge cases of each plan."""
    rng = random.Random(13)
    found = [
        (1, 1),
        (1, 300),
        (300, 1),
        (2, 2),
        (SIDE, SIDE),
        (SIDE * 2, SIDE),
        (SIDE, SIDE * 3),
        (337, 336),
        (448, 448),
    ]
    while len(found) < count:
        area, ratio = math.exp(rng.uniform(4, 15)), math.exp(rng.gauss(0, 0.8))
        found.append((max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))))
    return found


class Coordinates:
    """Pictures whose pixels say where they come from: x, y and 1; what is filled is 0."""

    @staticmethod
    def of(width: int, height: int) -> np.ndarray:
        y, x = np.mgrid[0:height, 0:width]
        return np.stack([x, y, np.ones_like(x)]).astype(np.int32)


def views_by_coordinates(layout: ImageLayout) -> list[np.ndarray]:
    """What a processor whose resize makes coordinates would return for each view of a layout."""
    found = []
    for view in layout.views:
        canvas = layout.canvases[view.canvas]
        resized, frame = Coordinates.of(*canvas.resized), canvas.frame
        whole = np.zeros((3, *frame.size[::-1]), np.int32)
        left, top = max(frame.left, 0), max(frame.top, 0)
        part = resized[:, top : frame.bottom, left : frame.right]
        y, x = top - frame.top, left - frame.left
        whole[:, y : y + part.shape[1], x : x + part.shape[2]] = part
        found.append(whole[:, view.box.top : view.box.bottom, view.box.left : view.box.right])
    return found


def with_coordinates(processor: Any) -> Any:
    processor.resize = lambda image, size, **_: Coordinates.of(size.width, size.height)
    return processor


def blank(width: int, height: int) -> np.ndarray:
    return np.broadcast_to(np.int32(0), (3, height, width))


def llava_next(pinpoints: tuple[tuple[int, int], ...] = PINPOINTS, kind: str = "next") -> Any:
    if kind == "next":
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil as Kind
    else:
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil as Kind,
        )
    return Kind(image_grid_pinpoints=[list(one) for one in pinpoints], size={"height": SIDE, "width": SIDE})


def anyres() -> AnyresPlan:
    return AnyresPlan(SIDE, FEATURES**2, pinpoints=PINPOINTS)


def anyres_max(limit: int = 9) -> AnyresMaxPlan:
    return AnyresMaxPlan(SIDE, FEATURES**2, pinpoints=MANY, max_tiles=limit)


@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_tiles_of_anyres(kind: str) -> None:
    plan: ImagePlan = anyres() if kind == "next" else anyres_max()
    processor = with_coordinates(llava_next(PINPOINTS if kind == "next" else MANY, kind))
    points = processor.image_grid_pinpoints
    for width, height in sizes():
        theirs = processor.get_image_patches(blank(width, height), points, (SIDE, SIDE), SIDE, resample=3)
        ours = views_by_coordinates(plan.plan(width, height))
        assert len(ours) == len(theirs), (width, height)
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)), (width, height)


def merged(plan: ImagePlan, layout: ImageLayout, features: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
    """Features in the order of the tokens, as the model does it."""
    found = arrange(plan, [layout])
    assert found.index is not None
    rows = torch.cat([features.flatten(0, 1), newline[None]])[torch.from_numpy(found.index)]
    return rows[:, 0] if found.weight is None else (rows * torch.from_numpy(found.weight)[..., None]).sum(1)


@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_tokens_and_features_of_anyres(kind: str) -> None:
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=SIDE, patch_size=SIDE // FEATURES),
        image_grid_pinpoints=[list(one) for one in (PINPOINTS if kind == "next" else MANY)],
    )
    counts = SimpleNamespace(
        image_processor=config, patch_size=SIDE // FEATURES, num_image_tokens=FEATURES**2,
        num_additional_image_tokens=0, vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_4",
    )  # fmt: skip
    plan: ImagePlan
    if kind == "next":
        from transformers.models.llava_next.modeling_llava_next import LlavaNextModel as Model
        from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor as Processor

        plan, extra = anyres(), {"vision_feature_select_strategy": "full"}
    else:
        from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel as Model
        from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor as Processor

        plan, extra = anyres_max(4), {"vision_aspect_ratio": "anyres_max_4"}
    counts._get_unpadded_features = lambda *args: Processor._get_unpadded_features(counts, *args)
    generator, interpolated, empty = torch.Generator().manual_seed(0), 0, 0
    for width, height in sizes():
        layout = plan.plan(width, height)
        expected = Processor._get_number_of_features(counts, height, width, SIDE, SIDE)
        assert layout.runs == (expected,), (width, height)
        features = torch.randn(len(layout.views), FEATURES**2, 5, generator=generator)
        newline = torch.randn(5, generator=generator)
        found = arrange(plan, [layout])
        assert found.index is not None
        interpolated += found.weight is not None
        assert len(found.index) == expected
        try:
            theirs, _ = Model.pack_image_features(
                SimpleNamespace(config=config),
                [features],
                torch.tensor([[height, width]]),
                image_newline=newline,
                **extra,
            )
        except RuntimeError:  # theirs cannot interpolate a picture of no columns
            empty += 1
            continue
        torch.testing.assert_close(merged(plan, layout, features, newline), theirs[0], rtol=1e-5, atol=1e-5)
    assert (interpolated > 50) == (kind == "onevision")
    assert empty < 10


def test_several_pictures_of_onevision() -> None:
    """Each is one padded view with a newline behind it, as ``batch_num_images`` does."""
    plan, layout = anyres_max(), anyres_max().plan(100, 60, images=2)
    assert (len(layout.views), layout.runs) == (1, (FEATURES**2 + 1,))
    assert layout.canvases[0].source == (0, -20, 100, 80)
    found = arrange(plan, [layout, plan.plan(SIDE, SIDE)])
    assert found.index is not None and found.features == 27
    assert found.index[:10, 0].tolist() == [*range(9), -1]
    assert found.index[10:19, 0].tolist() == [*range(9, 18)]
    assert anyres().plan(100, 60, images=2).runs == anyres().plan(100, 60).runs


def test_dynamic_tiles() -> None:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
        GotOcr2ImageProcessorPil,
        get_optimal_tiled_canvas,
    )

    processor = with_coordinates(GotOcr2ImageProcessorPil())
    square = SimpleNamespace(height=SIDE, width=SIDE)
    for low, high, thumbnail in ((1, 12, True), (1, 6, False), (3, 12, True), (1, 1, True)):
        plan = DynamicTilesPlan(SIDE, 4, min_tiles=low, max_tiles=high, thumbnail=thumbnail)
        for width, height in sizes() if high == 12 else sizes(100):
            layout = plan.plan(width, height)
            columns, rows = get_optimal_tiled_canvas((height, width), (SIDE, SIDE), low, high)
            assert layout.grid == (rows, columns)
            theirs = processor.crop_image_to_patches(blank(width, height), low, high, thumbnail, square, resample=3)
            ours = views_by_coordinates(layout)
            assert layout.runs == (4 * len(theirs),)
            assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)), (width, height)
            assert arrange(plan, [layout]).index is None


def test_slices() -> None:
    """MiniCPM-V's published slicing; Transformers has it for 4.6, whose views are multiples of 4 patches."""
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

    theirs = MiniCPMV4_6ImageProcessorPil()
    for multiple, most in ((56, 9), (14, 9), (14, 4)):
        plan = SlicesPlan(448, 64, max_tiles=most, multiple=multiple)
        for width, height in sizes():
            layout = plan.plan(width, height)
            grid = theirs.get_sliced_grid((height, width), most, 448)
            fitted = theirs.find_best_resize((height, width), 448, multiple / 4, "16x", allow_upscale=grid is None)
            assert layout.canvases[0].resized == tuple(fitted[::-1])
            assert layout.views[0].box == (0, 0, *fitted[::-1])
            assert layout.grid == tuple(grid or (1, 1))
            assert len(layout.views) == 1 + (grid[0] * grid[1] if grid else 0)
            if grid:
                tall, wide = theirs.get_refine_size((height, width), grid, 448, multiple / 4, "16x", allow_upscale=True)
                assert layout.canvases[1].resized == (wide, tall)
                boxes = [view.box for view in layout.views[1:]]
                w, h = wide // grid[1], tall // grid[0]
                assert boxes == [(x * w, y * h, x * w + w, y * h + h) for y in range(grid[0]) for x in range(grid[1])]


def test_markup_of_slices() -> None:
    """Written out from MiniCPM-V's published ``get_grid_placeholder`` (2.0, 2.5) and processor (2.6)."""
    nested, flat = SlicesPlan(448, 64), SlicesPlan(448, 64, markup="flat")
    assert nested.plan(300, 200).runs == ("<image>", 64, "</image>")
    assert nested.plan(900, 900).grid == (2, 2)
    assert nested.plan(900, 900).runs == (
        "<image>", 64, "</image><slice><image>", 64, "</image><image>", 64, "</image>\n<image>", 64,
        "</image><image>", 64, "</image></slice>",
    )  # fmt: skip
    assert flat.plan(900, 900).runs == (
        "<image>", 64, "</image><slice>", 64, "</slice><slice>", 64, "</slice>\n<slice>", 64, "</slice><slice>", 64,
        "</slice>",
    )  # fmt: skip
    assert nested.plan(900, 900).tokens == 5 * 64


def test_crop_and_pad() -> None:
    from transformers import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    picture = Image.effect_noise((64, 64), 90).convert("RGB")
    for width, height in [*sizes(60)[10:], (30, 61), (61, 30), (99, 42), (42, 99), (43, 44)]:
        width, height = width % 200 + 1, height % 200 + 1
        image = picture.resize((width, height))
        raw = {"do_normalize": False, "do_rescale": False, "crop_size": SIDE}
        for plan, processor in (
            (CropPlan(SIDE, 9, short_side=SIDE), CLIPImageProcessorPil(size={"shortest_edge": SIDE}, **raw)),
            (CropPlan(SIDE, 9, short_side=30), CLIPImageProcessorPil(size={"shortest_edge": 30}, **raw)),
            (PadPlan(SIDE, 9, fill=(122, 116, 104)), LlavaImageProcessorPil(
                size={"shortest_edge": SIDE}, do_pad=True, **raw)),
        ):  # fmt: skip
            (ours,) = render_with_pil(image, plan, plan.plan(width, height))
            theirs = np.array(processor(image)["pixel_values"][0])
            assert np.array_equal(ours.transpose(2, 0, 1), theirs), (plan, width, height)


def test_what_no_plan_can_have() -> None:
    crop, pad = CropPlan(336, 576, short_side=336), PadPlan(336, 576)
    for plan in (
        crop,
        pad,
        SquashPlan(336, 576),
        anyres(),
        anyres_max(),
        DynamicTilesPlan(448, 256),
        SlicesPlan(448, 64),
    ):
        for width, height in ((0, 0), (0, 5), (5, 0)):
            with pytest.raises(ImageError, match="no pixels"):
                plan.plan(width, height)
    for plan in (crop, pad):
        with pytest.raises(ImageError, match="too narrow: 1 x 10000 pixels would become"):
            plan.plan(1, 10000)
    for plan in (SquashPlan(336, 576), anyres(), anyres_max(), DynamicTilesPlan(448, 256), SlicesPlan(448, 64)):
        assert plan.plan(1, 10000).tokens > 0
