"""Two renderings of a picture for two towers: pixels of DeepSeek-VL-7B's processor, and what does not go together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from data_helpers import encode_image
from PIL import Image
from transformers import CLIPImageProcessorPil
from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import (
    DeepseekVLHybridImageProcessorPil,
)

from megavlm.config.checks import check_recipe
from megavlm.config.errors import UserError
from megavlm.config.load import load_recipe
from megavlm.data.decoders import make_decoder
from megavlm.data.media import plan_of
from megavlm.data.plans_single import CropSquashPlan, FitPairPlan, SquashPairPlan
from megavlm.data.seen import said
from megavlm.families.presets import expand_presets

SMALL, LARGE = 28, 64
PLAN = FitPairPlan(LARGE, 16, fill=(122, 116, 104), min_side=14, small=SMALL)


@pytest.mark.family("deepseek_vl_hybrid")
def test_pixels_are_those_of_its_processor() -> None:
    """Of pictures of any proportions, bit for bit with PIL; within a level of 255 with the quick decoder."""
    raw = {"do_normalize": False, "do_rescale": False}
    processor = DeepseekVLHybridImageProcessorPil(
        size={"height": SMALL, "width": SMALL}, high_res_size={"height": LARGE, "width": LARGE}, **raw
    )
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    for size in ((40, 30), (64, 64), (200, 31), (17, 300), (1, 900), (129, 65)):
        picture = noise.resize(size)
        made = processor(picture)
        wanted = np.concatenate([np.array(made[key][0]).ravel() for key in ("pixel_values", "high_res_pixel_values")])
        found = make_decoder("pil").decode([encode_image(picture, "PNG")], PLAN)
        assert not found.failed and found.pixels.shape == (1, *PLAN.row)
        assert np.array_equal(found.pixels[0].numpy(), wanted.astype(np.uint8)), size
        quick = make_decoder("simplejpeg").decode([encode_image(picture)] * 2, PLAN).pixels
        slow = make_decoder("pil").decode([encode_image(picture)] * 2, PLAN).pixels
        assert quick.shape == (2, *PLAN.row)
        assert ((quick.int() - slow.int()).abs() <= 2).float().mean() > 0.99, size
    layout = PLAN.plan(40, 30)
    assert (PLAN.views_of(layout), PLAN.features_of(layout), layout.tokens) == (1, 16, 16)
    assert said(PLAN, layout) == "whole at 28 x 28, padded + whole at 64 x 64, padded: 16 tokens"
    broken = make_decoder("pil").decode([b"no picture"], PLAN)
    assert broken.failed == [0] and torch.all(broken.pixels == 128)


@pytest.mark.family("vary")
def test_pixels_of_a_crop_and_a_squash_are_those_of_its_processors() -> None:
    """CLIP's, and ``BlipImageEvalProcessor`` of Vary's code, which is a resize; bit for bit with PIL."""
    plan = CropSquashPlan(LARGE, 16, small=SMALL)
    square = {"height": SMALL, "width": SMALL}
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SMALL}, crop_size=square, do_normalize=False, do_rescale=False
    )
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    for size in ((40, 30), (64, 64), (200, 31), (17, 300), (129, 65)):
        picture = noise.resize(size)
        large = np.array(picture.resize((LARGE, LARGE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        wanted = np.concatenate([np.array(processor(picture)["pixel_values"][0]).ravel(), large.ravel()])
        found = make_decoder("pil").decode([encode_image(picture, "PNG")], plan)
        assert not found.failed and found.pixels.shape == (1, *plan.row)
        assert np.array_equal(found.pixels[0].numpy(), wanted.astype(np.uint8)), size
        quick = make_decoder("simplejpeg").decode([encode_image(picture)] * 2, plan).pixels
        slow = make_decoder("pil").decode([encode_image(picture)] * 2, plan).pixels
        assert ((quick.int() - slow.int()).abs() <= 2).float().mean() > 0.99, size
    layout = plan.plan(40, 30)
    assert (plan.views_of(layout), plan.features_of(layout), layout.tokens) == (1, 16, 16)
    assert said(plan, layout) == "whole at 28 x 28 + whole at 64 x 64: 16 tokens"


@pytest.mark.family("vary")
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["model.image={kind: crop}"], "crop makes one rendering of 1024 x 1024 pixels of a picture, and the tower"),
        (
            ["model.image={kind: squash}"],
            "of 224 x 224 and 1024 x 1024 pixels; set it to fit_pair, crop_squash or squash_pair",
        ),
        (["model.image={kind: crop_squash, min_side: 20}"], "model.image.min_side"),
        (["model.vision={preset: clip_vit_l_14_224}"], "crop_squash makes two renderings of a picture, and the tower"),
        (["model.vision.high_output_grid=24"], "makes 24 x 24 features of a picture, which are no whole number"),
        (["model.connector.first=second"], "model.connector.first"),
    ],
)
def test_renderings_of_vary_that_do_not_go_together(words: list[str], line: str) -> None:
    with pytest.raises(UserError) as error:
        check_recipe(load_recipe("vary_toy/sft", words, expand_presets))
    assert line in str(error.value), error.value


@pytest.mark.family("cogagent")
def test_each_of_cogagents_squares_is_made_of_the_picture_itself() -> None:
    """As torchvision's Resize makes it of a picture of PIL (``build_conversation_input_ids``): bicubic, bit for bit."""
    plan = SquashPairPlan(LARGE, 18, small=SMALL)
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    for size in ((40, 30), (200, 31), (17, 300)):
        picture = noise.resize(size)
        sides = [picture.resize((side, side), Image.Resampling.BICUBIC) for side in (SMALL, LARGE)]
        wanted = np.concatenate([np.array(one).transpose(2, 0, 1).ravel() for one in sides])
        found = make_decoder("pil").decode([encode_image(picture, "PNG")], plan)
        assert not found.failed and np.array_equal(found.pixels[0].numpy(), wanted), size
    layout = plan.plan(40, 30)
    assert (plan.views_of(layout), layout.tokens, plan.sides) == (1, 18, (SMALL, LARGE))


@pytest.mark.family("deepseek_vl_hybrid")
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["model.image={kind: fit}"], "fit makes one rendering of 1024 x 1024 pixels of a picture, and the tower"),
        (["model.image={kind: squash}"], "takes renderings of 384 x 384 and 1024 x 1024 pixels; set it to fit_pair"),
        (["model.image={kind: dynamic_tiles}"], "makes one rendering of 384 x 384 pixels of a picture, and the tower"),
        (["model.video.kind=internvl"], "model.video.kind: the frames of internvl are for one tower"),
        (["model.image.min_side=1025"], "model.vision.high_image_size 1024); lower it"),
        (["model.vision.high_output_grid=25"], "makes 25 x 25 features of a picture, which are no whole number"),
        (["model.vision.high_patch_size=15"], "high_image_size: 1024 is not divisible by model.vision.high_patch"),
        (
            ["model.vision.deepstack_layers=[0]", "model.vision.post_layernorm=false"],
            "model.vision.deepstack_layers: goes with one tower",
        ),
        (
            ["model.vision.class_token=true", "model.vision.class_feature=true", "model.connector={preset: q_former}"],
            "model.vision.class_feature: goes with one tower",
        ),
        (["model.vision.high_lr_multiplier=0.5"], "high_lr_multiplier: has no effect with model.vision.frozen_tower"),
        (["model.vision.low_from=high"], "model.vision.low_from: high takes pixels that the second tower's mean"),
        (["model.vision.high_window=3"], "did you mean model.vision.high_window_size?"),
    ],
)  # fmt: skip
def test_renderings_and_towers_that_do_not_go_together_are_one_line(words: list[str], line: str) -> None:
    with pytest.raises(UserError) as error:
        check_recipe(load_recipe("deepseek_vl_7b/sft", words, expand_presets))
    assert line in str(error.value) and str(error.value).count("\n") <= 1, error.value


@pytest.mark.family("minigemini")
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["model.vision.low_from=plan"], "pad makes one rendering of 1536 x 1536 pixels of a picture, and the tower"),
        (
            ["model.vision.low_from=plan", "model.image={kind: fit_pair}"],
            "low_tiles: the first tower sees tiles of the",
        ),
        (["model.vision.low_tiles=1"], "model.vision.low_whole: the whole picture is seen without tiles"),
        (["model.vision.high_image_size=1568"], "each of the first tower's 48 x 48 (model.vision.image_size, in 2 x 2"),
        (["model.vision.high_image_size=1540"], "high_image_size: 1540 is not a multiple of 32"),
        (["model.image={kind: fit_pair}"], "fit_pair makes two renderings of a picture, and the tower"),
        (["data.sequence_length=2048"], "one image takes 2882 positions"),
    ],
)
def test_renderings_of_minigemini_hd_that_do_not_go_together(words: list[str], line: str) -> None:
    with pytest.raises(UserError) as error:
        check_recipe(load_recipe("minigemini_7b_hd/sft", words, expand_presets))
    assert line in str(error.value), error.value


def test_a_tower_alone_takes_no_pair_and_a_connector_of_two_no_tower_alone() -> None:
    for words, line in (
        (
            "model.image={kind: fit_pair}",
            "fit_pair makes two renderings of a picture, and the tower 'siglip_vit' takes",
        ),
        (
            "model.connector={preset: hybrid_split}",
            "hybrid_split joins the features of two towers, and 'siglip_vit' is",
        ),
        (
            "model.connector={preset: patch_mining}",
            "patch_mining mines the features of a second tower, and 'siglip_vit'",
        ),
    ):
        with pytest.raises(UserError, match=line):
            check_recipe(load_recipe("deepseek_vl_1_3b/sft", [words], expand_presets))


def test_minigemini_sees_the_larger_rendering_alone() -> None:
    tower = "model.vision={preset: minigemini_clip_convnext}"
    words = [tower, "model.connector={preset: patch_mining}", "model.image={kind: pad}"]
    model = load_recipe("llava_1_5_7b/sft", words, expand_presets).model
    assert (plan_of(model).side, plan_of(model).row, model.tokens_per_view) == (768, (3, 768, 768), 576)
    # On Mixtral, as its 8x7B is.
    words += ["model.language={preset: mixtral_8x7b}", "parallel.expert_model_parallel_size=8"]
    words += ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true", "model.template=mistral"]
    recipe = load_recipe("llava_1_5_7b/sft", words, expand_presets)
    check_recipe(recipe)
    assert recipe.model.language.num_moe_experts == 8 and all(recipe.model.language.expert_layers)
