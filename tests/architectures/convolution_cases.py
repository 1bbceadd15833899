"""Compare ConvNeXt and SAM's tower with Transformers' classes of the same weights, at any tensor-parallel size.

The weights are mapped by hand, apart from the converter's tables.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from samples import recipe
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    DeepseekVLHybridConfig,
    DeepseekVLHybridModel,
    LlamaConfig,
    SamVisionConfig,
    SiglipVisionConfig,
)
from transformers_cases import close, fill, gradients_of, load, same_gradients

from megavlm.config.architecture import VISION
from megavlm.config.schema import Recipe
from megavlm.models.build import build_context

IMAGES = 3
DEPTHS, WIDTHS = (1, 2, 1), (16, 24, 40)


def tower_recipe(**vision: Any) -> Recipe:
    """Return the recipe of a tower at this job's tensor-parallel size."""
    size = mpu.get_tensor_model_parallel_world_size()
    return recipe(model={"preset": "tiny", "vision": vision}, parallel={"tensor_model_parallel_size": size})


def built(made: Recipe) -> nn.Module:
    """Return our tower of this rank."""
    return VISION.find(made.model.vision.preset).build(made.model.vision, build_context(made))


CONVNEXT: dict[str, dict[str, Any]] = {
    "last": {},
    "all": {"feature_stages": (1, 2, 3)},
    "two": {"feature_stages": (1, 3), "gradient_checkpointing": True},
}


def convnext_recipe(name: str) -> Recipe:
    """Return the recipe of one of ``CONVNEXT``."""
    return tower_recipe(preset="convnext", image_size=32, depths=DEPTHS, widths=WIDTHS, **CONVNEXT[name])


def convnext_map(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return Transformers' tensors in our names."""
    names = {"conv1": "embeddings.patch_embeddings", "ln_pre": "embeddings.layernorm"}
    number, scales = 0, {}
    for stage, depth in enumerate(DEPTHS):
        theirs = f"encoder.stages.{stage}."
        if stage:
            names[f"layers.{number}.downsample.norm"] = theirs + "downsampling_layer.0"
            names[f"layers.{number}.downsample.conv"] = theirs + "downsampling_layer.1"
        for block in range(depth):
            a, b = f"layers.{number}.", f"{theirs}layers.{block}."
            names |= {a + "depthwise": b + "dwconv", a + "norm": b + "layernorm"}
            names |= {a + "linear_fc1": b + "pwconv1", a + "linear_fc2": b + "pwconv2"}
            scales[a + "scale"] = b + "layer_scale_parameter"
            number += 1
    both = {f"{a}.{kind}": f"{b}.{kind}" for a, b in names.items() for kind in ("weight", "bias")} | scales
    return {mine: state[theirs] for mine, theirs in both.items() if theirs in state}


def compare_convnext(name: str) -> None:
    """Compare features, as MiniGemini's code joins them (``openclip_encoder.py``), and all gradients."""
    reference: Any = ConvNextModel(
        ConvNextConfig(depths=DEPTHS, hidden_sizes=WIDTHS, num_stages=3, layer_scale_init_value=1.0)
    )
    fill(reference)
    made = convnext_recipe(name)
    vision, ours = made.model.vision, built(made)
    load(ours, convnext_map(dict(reference.named_parameters())))
    pixels = torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(8))
    maps = reference(pixels, output_hidden_states=True).hidden_states[1:]  # behind each stage
    maps = [maps[stage] for stage in vision.stages]
    size = maps[0].shape[-2:]
    expected = torch.cat([F.interpolate(one, size=size, mode="bilinear", align_corners=False) for one in maps], dim=1)
    expected = expected.flatten(2).transpose(1, 2)
    got = ours(pixels)
    assert got.shape == (vision.patches_per_image, IMAGES, vision.feature_size)
    close(got.transpose(0, 1), expected, "features")
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9))
    (got.transpose(0, 1) * weights).sum().backward()
    (expected * weights).sum().backward()
    same_gradients(ours, convnext_map(gradients_of(reference)))


SIDE, HEADS, LAYERS, WIDTH, NECK = 32, 4, 3, 48, 8
SAM: dict[str, dict[str, Any]] = {
    # Windows of 3 in a square of 8, so that one more row is filled with zeros; a map of 8 that is stretched to 12.
    "plain": {"output_grid": 2},
    "deepseek": {"output_grid": 3, "second_neck_layer": 1},
    "recomputed": {"output_grid": 3, "second_neck_layer": 1, "gradient_checkpointing": True},
}


def sam_recipe(name: str) -> Recipe:
    """Return the recipe of one of ``SAM``."""
    return tower_recipe(
        preset="sam_vit", image_size=SIDE, patch_size=4, hidden_size=WIDTH, num_layers=LAYERS, ffn_hidden_size=64,
        num_attention_heads=HEADS, window_size=3, global_layers=(1,), neck_size=NECK, **SAM[name],
    )  # fmt: skip


def sam_map(state: dict[str, Tensor], *, second: bool) -> dict[str, Tensor]:
    """Return Transformers' tensors of DeepSeek-VL's high-resolution tower in our names and layouts."""
    tower, out = "high_res_vision_model.vision_encoder.", {}
    names = {"conv1": tower + "patch_embed.projection"}
    for i in range(LAYERS):
        a, b = f"layers.{i}.", f"{tower}layers.{i}."
        for kind in ("weight", "bias"):
            blocks = state[f"{b}attn.qkv.{kind}"].unflatten(0, (3, HEADS, -1))
            out[f"{a}self_attention.linear_qkv.{kind}"] = blocks.transpose(0, 1).flatten(0, 2)
        out[a + "self_attention.core_attention.rows"] = state[b + "attn.rel_pos_h"]
        out[a + "self_attention.core_attention.columns"] = state[b + "attn.rel_pos_w"]
        names |= {a + "self_attention.linear_proj": b + "attn.proj", a + "mlp.linear_fc1": b + "mlp.lin1"}
        names |= {a + "mlp.linear_fc2": b + "mlp.lin2", a + "input_layernorm": b + "layer_norm1"}
        names[a + "pre_mlp_layernorm"] = b + "layer_norm2"
    necks = {"neck": tower + "neck"} | ({"second_neck": "high_res_vision_neck"} if second else {})
    for a, b in necks.items():
        names |= {f"{a}.conv{i}": f"{b}.conv{i}" for i in (1, 2)}
        names |= {f"{a}.norm{i}": f"{b}.layer_norm{i}" for i in (1, 2)}
    names |= {f"halve{i}": f"high_res_vision_proj.conv{i}" for i in (1, 2)}
    out["positional_embedding"] = state[tower + "pos_embed"].flatten(0, 2)
    if second:
        out["second_scale"] = state["high_res_vision_alpha"]
    both = {f"{a}.{kind}": f"{b}.{kind}" for a, b in names.items() for kind in ("weight", "bias")}
    return out | {mine: state[theirs] for mine, theirs in both.items() if theirs in state}


def hybrid_reference(side: int, patch: int, embed: int = 8) -> Any:
    """DeepSeek-VL-7B with a SigLIP of one layer, on squares of ``side`` patches."""
    high = SamVisionConfig(
        hidden_size=WIDTH, output_channels=NECK, num_hidden_layers=LAYERS, num_attention_heads=HEADS, image_size=SIDE,
        patch_size=4, window_size=3, global_attn_indexes=[1], mlp_dim=64,
    )  # fmt: skip
    low = SiglipVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, image_size=side * patch,
        patch_size=patch, vision_use_head=False, hidden_act="gelu",
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=embed, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
    )  # fmt: skip
    config = DeepseekVLHybridConfig(text_config=text, vision_config=low, high_res_vision_config=high)
    return DeepseekVLHybridModel(config)


def compare_sam(name: str) -> None:
    """Compare features with DeepSeek-VL-7B's high-resolution half, and all gradients; without its second neck too."""
    made = sam_recipe(name)
    vision, ours = made.model.vision, built(made)
    second = vision.second_neck_layer is not None
    reference = hybrid_reference(vision.output_grid, 1)
    fill(reference)
    if not second:
        with torch.no_grad():
            reference.high_res_vision_alpha.zero_()
    load(ours, sam_map(dict(reference.named_parameters()), second=second))
    pixels = torch.randn(IMAGES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(8))
    expected, got = reference.get_high_res_image_features(pixels).last_hidden_state, ours(pixels)
    assert got.shape == (vision.output_grid**2, IMAGES, 4 * NECK)
    close(got.transpose(0, 1), expected, "features")
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9))
    (got.transpose(0, 1) * weights).sum().backward()
    (expected * weights).sum().backward()
    mapped = sam_map(gradients_of(reference), second=second)
    if second:  # one number, the sum of many with either sign
        scale, expected_scale = ours.second_scale, mapped["second_scale"]
        torch.testing.assert_close(scale.grad, expected_scale, rtol=1e-4, atol=0)
        scale.grad, mapped["second_scale"] = torch.ones(1), torch.ones(1)
    same_gradients(ours, mapped)


CASES = {"convnext": lambda: compare_convnext("all"), "sam": lambda: compare_sam("deepseek")}
"""What is compared on several ranks: each finds the whole gradient of what it has whole."""
