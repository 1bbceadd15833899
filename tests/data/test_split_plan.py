"""DeepSeek-VL's and Idefics3's plans against Transformers' own processors (5.23): boxes, tokens, text and pixels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_image_plans import Coordinates, blank, sizes, views_by_coordinates
from transformers import Idefics3Config
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

from megavlm.data.image_header import ImageError
from megavlm.data.plans_single import FitPlan
from megavlm.data.plans_split import SplitTilesPlan
from megavlm.data.render import render_with_pil
from megavlm.families.idefics3 import _MOST_PATCHES, _ROUNDED

SIDE = 42


class _Sizes(Idefics3ImageProcessorPil):
    """Resizes to coordinates, and keeps the sizes."""

    def resize(self, image: np.ndarray, size: Any, **keys: Any) -> np.ndarray:
        """Return what says where it comes from."""
        if size.longest_edge:
            from transformers.models.idefics3.image_processing_pil_idefics3 import get_resize_output_image_size

            height, width = get_resize_output_image_size(image, resolution_max_side=size.longest_edge)
        else:
            height, width = size.height, size.width
        self.sizes.append((width, height))
        return Coordinates.of(width, height)


@pytest.mark.family("idefics3")
@pytest.mark.parametrize(("longest", "splitting"), [(4 * SIDE, True), (3 * SIDE - 5, True), (SIDE, True), (99, False)])
def test_tiles_tokens_and_text_of_500_pictures(longest: int, splitting: bool) -> None:
    processor = _Sizes(
        size={"longest_edge": longest}, max_image_size={"longest_edge": SIDE}, do_image_splitting=splitting,
        do_rescale=False, do_normalize=False,
    )  # fmt: skip
    writer = SimpleNamespace(
        fake_image_token="<fake_token_around_image>", image_token="<image>", global_image_tag="<global-img>",
        image_seq_len=9,
    )  # fmt: skip
    plan = SplitTilesPlan(SIDE, 9, "lanczos", longest_edge=longest, splitting=splitting)
    narrow = 0
    for width, height in sizes():
        try:
            layout = plan.plan(width, height)
        except ImageError:
            narrow += 1
            continue
        processor.sizes = []
        try:
            theirs = processor([[blank(width, height)]], return_row_col_info=True, input_data_format="channels_first")
        except ValueError:  # of a picture that their rounding leaves no row of
            narrow += 1
            continue
        ours = views_by_coordinates(layout)
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs["pixel_values"][0], strict=True)), (width, height)
        steps = [size for one in layout.canvases for size in (*one.earlier, one.resized)]
        assert list(dict.fromkeys(steps)) == list(dict.fromkeys(processor.sizes)), (width, height)
        text = Idefics3Processor.replace_image_token(writer, {"rows": theirs["rows"], "cols": theirs["cols"]}, 0)
        assert "".join(run if isinstance(run, str) else "<image>" * run for run in layout.runs) == text
    assert narrow < 5


@pytest.mark.family("idefics3")
@pytest.mark.parametrize("size", [(70, 50), (31, 90), (200, 201), (42, 42)])
def test_pixels_of_tiles(size: tuple[int, int]) -> None:
    picture = Image.effect_noise((64, 64), 90).convert("RGB").resize(size)
    plan = SplitTilesPlan(SIDE, 9, "lanczos", longest_edge=4 * SIDE)
    processor = Idefics3ImageProcessorPil(
        size={"longest_edge": 4 * SIDE}, max_image_size={"longest_edge": SIDE}, do_rescale=False, do_normalize=False
    )
    theirs = processor([[picture]])["pixel_values"][0]
    ours = list(render_with_pil(picture, plan, plan.plan(*size)))
    assert len(ours) == len(theirs) > 1
    assert all(np.array_equal(a.transpose(2, 0, 1), b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.family("deepseek_vl")
def test_pixels_of_fitted_pictures() -> None:
    picture = Image.effect_noise((64, 64), 90).convert("RGB")
    raw = {"do_normalize": False, "do_rescale": False, "image_mean": [0.5] * 3}
    for least in (14, 5):
        plan = FitPlan(SIDE, 9, fill=(127, 127, 127), min_side=least)
        processor = DeepseekVLImageProcessorPil(size={"height": SIDE, "width": SIDE}, min_size=least, **raw)
        for width, height in [*sizes(80)[:60], (30, 61), (61, 30), (42, 99), (1, 900)]:
            width, height = (side if least == 5 else side % 200 + 1 for side in (width, height))
            image = picture.resize((min(width, 900), min(height, 900)))
            (ours,) = render_with_pil(image, plan, plan.plan(*image.size))
            theirs = np.array(processor(image)["pixel_values"][0])
            assert np.array_equal(ours.transpose(2, 0, 1), theirs), image.size


@pytest.mark.family("idefics3")
def test_positions_of_whole_tiles_are_the_table_but_for_those_that_are_refused() -> None:
    """The class finds each patch's row by fractions of the picture, in fp32."""
    for grid in range(2, _MOST_PATCHES + 1):
        tower = Idefics3VisionEmbeddings(Idefics3Config(vision_config={
            "hidden_size": 1, "num_attention_heads": 1, "image_size": grid, "patch_size": 1
        }).vision_config)  # fmt: skip
        with torch.no_grad():
            tower.patch_embedding.weight.zero_()
            tower.patch_embedding.bias.zero_()
            tower.position_embedding.weight.copy_(torch.arange(grid**2)[:, None])
            rows = tower(torch.zeros(1, 3, grid, grid), torch.ones(1, grid, grid, dtype=torch.bool))[0, :, 0]
        assert (rows.tolist() == list(range(grid**2))) == (grid not in _ROUNDED), grid
