"""DINOv2, EVA01 and EVA02 compute what is published; every registered tower is built, counted and planned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from eva02_reference import Eva02
from pydantic import TypeAdapter
from saved_tensors import saved_tensors
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tower_cases import CASES, IMAGE, WIDTH, built, compare, model_of
from transformers import AutoConfig, AutoModel, Blip2VisionConfig, Blip2VisionModel
from transformers_cases import fill

from megavlm.architectures.context import BuildContext
from megavlm.architectures.cost import Kernels, Pictures
from megavlm.architectures.towers.vit import cost
from megavlm.config.architecture import VISION
from megavlm.config.schema import ParallelConfig
from megavlm.config.split import tensor_ranks
from megavlm.families.known import FAMILIES
from megavlm.families.presets import load_presets

load_presets()
SIZED = [name for name in VISION.names() if "hidden_size" in VISION.find(name).values]


@pytest.mark.parametrize("name", CASES)
def test_equals_the_published_tower(name: str) -> None:
    compare(name)


RECOMPUTED = {"gradient_checkpointing": True}


@pytest.mark.parametrize(("name", "more"), [*((name, {}) for name in CASES), ("eva02", RECOMPUTED)])
def test_costs_are_what_torch_counts_and_keeps(name: str, more: dict[str, Any]) -> None:
    """Operations exactly, but for the table's; parameters exactly; kept bytes within 2 %.

    Recomputed, layer scale keeps nothing either, but Megatron-Core calls it with gradients on and so it seems to.
    """
    model, vision = built(name, **more), model_of(name, **more).vision
    shown, pictures = Pictures.alike(2, vision.grid), torch.randn(2, 3, IMAGE, IMAGE)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(pictures)
    table = 2 * vision.positional_grid**2 * vision.patches_per_image * vision.hidden_size
    table *= int(vision.positional_grid**2 != vision.patches_per_image)
    assert cost.work(vision, shown).total == counter.get_total_flops() - table
    assert sorted(one.elements for one in cost.parameters(vision, 1)) == sorted(p.numel() for p in model.parameters())
    with saved_tensors(model.parameters()) as saved:
        model(pictures)
    plain = Kernels(fused=False, number_bytes=4)
    assert cost.kept(vision, 1, shown, plain) == pytest.approx(saved.bytes, rel=0.02)


def test_layers_may_be_taken_one_by_one_and_recomputed() -> None:
    """Several feature layers, and recomputation, give the same angles and gradients as the block does."""
    torch.manual_seed(0)
    whole, several = built("eva02"), built("eva02", feature_layers=(1, 2), gradient_checkpointing=True)
    several.load_state_dict(whole.state_dict())
    pictures, found = torch.randn(2, 3, IMAGE, IMAGE), []
    for model, width in ((whole, 0), (several, WIDTH)):
        out = model(pictures)[..., width:]
        out.square().sum().backward()
        found.append([out, *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_reference_is_timms() -> None:
    """timm is no dependency (it needs a torchvision of the same build as torch): this runs where it is installed."""
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(
        "eva02_large_patch14_clip_336", pretrained=False, embed_dim=WIDTH, depth=3, num_heads=2, img_size=28,
        patch_size=7, num_classes=0,
    )  # fmt: skip
    ours = Eva02(WIDTH, 3, 2, int(WIDTH * 4 * 2 / 3), 7, 4)
    fill(theirs)
    ours.load_state_dict(theirs.state_dict())
    pictures = torch.randn(2, 3, 28, 28)
    x, _ = theirs.forward_intermediates(pictures, indices=[1], norm=False, output_fmt="NLC"), None
    features = x[1][0]
    expected = ours(pictures, 2)[:, 1:]
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.forward_features(pictures), ours.norm(ours(pictures, 3)), rtol=1e-5, atol=1e-5)


# timm 1.0.31's eva02_large_patch14_clip_336, without its last block, the norm behind that and its head.
PUBLISHED = {"eva02_clip_l_14_336": 304_432_832 - 12_602_024 - 2048 - 787_200}
ELSEWHERE = (
    "tiny_vit",
    "openclip_",
    "eva02_clip_e_",
    "intern_vit_6b",
    "qwen",
    "glm4v_",
    "rice_",
    "minicpm_v_",
    "sam_vit_b",
    "deepseek_vl_sam",
    "deepseek_vl_hybrid",
    "minigemini_",
    "mllama_",
    "vary_clip_sam",
    "cogagent_eva02_pair",
    "cobra_dinov2_siglip",
)
"""Towers that are counted with the whole models that they are part of (tests/families/published_totals.py), or in
test_convolution_towers.py and test_pairs.py."""


@pytest.mark.parametrize("name", SIZED)
def test_a_published_tower(name: str) -> None:
    """Its rules, its parameters (as planned, and as Transformers' class has them), and the shape of its features."""
    found = VISION.find(name)
    architecture = found.architecture
    assert architecture is not None
    vision = TypeAdapter(architecture.config).validate_python({"preset": name, **found.values})
    assert not list(architecture.rules(vision, ParallelConfig()))
    with torch.device("meta"):
        tower = found.build(vision, BuildContext(ParallelConfig(), initialize=False))
    sizes = [p.numel() for p in tower.parameters()]
    for tensor in (1, 2):
        planned = [one.elements for one in architecture.cost.parameters(vision, tensor)]
        assert len(planned) == len(sizes) and (tensor > 1 or sorted(planned) == sorted(sizes))
    if not vision.packed:  # those of the others ask for grids: tests/architectures/test_packed_vit.py
        with torch.device("meta"):
            features = tower(torch.empty(2, *vision.pixel_shape))
        assert features.shape == (vision.patches_per_image, 2, vision.feature_size)
    theirs = PUBLISHED.get(name) or transformers_parameters(vision)
    assert (theirs is None) == name.startswith(ELSEWHERE)
    assert theirs is None or sum(sizes) == theirs


def transformers_parameters(vision: Any) -> int | None:
    """Return the parameters of Transformers' class, without those that do nothing; None where it has no class."""
    if vision.preset.startswith("eva01"):
        side = vision.positional_grid * vision.patch_size
        with torch.device("meta"):
            blip2 = Blip2VisionModel(Blip2VisionConfig(image_size=side))
        return sum(p.numel() for p in blip2.parameters()) - vision.num_layers * vision.hidden_size  # the keys' bias
    model = replace(model_of("eva02"), vision=vision)
    for name in ("clip", "siglip", "siglip2", "dinov2"):
        if FAMILIES[name].refusal(model) is not None:
            continue
        config = dict(FAMILIES[name].config(model, {}))
        with torch.device("meta"):
            theirs = AutoModel.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
        idle = {"embeddings.mask_token", *(() if vision.post_layernorm else ("post_layernorm", "layernorm"))}
        return sum(
            p.numel()
            for key, p in theirs.named_parameters()
            if key not in idle and key.removeprefix("vision_model.").rpartition(".")[0] not in idle
        )
    return None


def test_an_mlp_that_the_ranks_do_not_divide_is_whole_on_each() -> None:
    """EVA02-L's MLP is 2730 wide: cut over two ranks, or three, and whole on each of four."""
    found = VISION.find("eva02_clip_l_14_336")
    vision = TypeAdapter(found.architecture.config).validate_python({"preset": found.name, **found.values})
    model = replace(model_of("eva02"), vision=vision)
    assert [tensor_ranks(model, "vision", tensor) for tensor in (1, 2, 4, 8)] == [1, 2, 1, 1]


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"activation": "gelu"}, "activation: gelu goes without model.vision.gated_mlp"),
        ({"gated_mlp": False}, "activation: silu goes with model.vision.gated_mlp"),
        ({"rotary_base": None}, "rotary_grid: there are no angles without model.vision.rotary_base"),
        ({"num_attention_heads": 4}, "heads of 10 have no angles for rows and for columns"),
        ({"add_qkv_bias": False}, "key_bias: nothing has a bias without model.vision.add_qkv_bias"),
        ({"qk_norm": "width"}, "key_bias: false goes without model.vision.qk_norm"),
        ({"class_feature": True, "register_tokens": 2}, "class_feature: needs model.vision.class_token, without"),
        ({"post_layernorm_epsilon": 1e-5}, "post_layernorm_epsilon: there is no such norm without"),
    ],
)
def test_parts_that_do_not_go_together_are_named(keys: dict[str, Any], line: str) -> None:
    vision = model_of("eva02", **keys).vision
    (found,) = VISION.find("eva02_vit").architecture.rules(vision, ParallelConfig())
    assert line in found
