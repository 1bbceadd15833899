"""Compare DINOv2 and EVA01 (with Transformers' classes), EVA02 (with :mod:`eva02_reference`), at any TP size.

The weights are mapped by hand, apart from the converter's tables.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from eva02_reference import Eva02
from megatron.core import parallel_state as mpu
from samples import recipe
from torch import Tensor, nn
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)
from transformers_cases import close, fill, gradients_of, load, qkv, same_gradients

from megavlm.config.architecture import VISION
from megavlm.config.schema import ModelConfig, Recipe
from megavlm.models.build import build_context

# 30 pixels are 4 patches of 7, and 2 pixels that no patch holds.
IMAGES, IMAGE, PATCH, WIDTH, HEADS, FFN, LAYERS = 3, 30, 7, 40, 2, 160, 3


@dataclass(frozen=True)
class Case:
    """What Transformers' class (EVA02: none) and our preset are told; ``layers`` of its three run in ours."""

    ours: dict[str, Any]
    layers: int = LAYERS
    table: int = 4
    """Side of the table."""
    model: Any = None
    config: Any = None
    theirs: dict[str, Any] = field(default_factory=dict)


_PLAIN = {"register_tokens": 0, "positional_antialias": False}
CASES: dict[str, Case] = {
    # A table that is made smaller, and one that is made larger; the layer before the last, and the norm behind all.
    "dinov2-reg": Case({}, 2, 6, Dinov2WithRegistersModel, Dinov2WithRegistersConfig),
    "dinov2-reg-swiglu": Case(
        {"gated_mlp": True, "activation": "silu", "ffn_hidden_size": 112, "post_layernorm": True}, 3, 3,
        Dinov2WithRegistersModel, Dinov2WithRegistersConfig,
        {"use_swiglu_ffn": True, "num_register_tokens": 2},
    ),
    "dinov2": Case({**_PLAIN, "post_layernorm": True}, 3, 6, Dinov2Model, Dinov2Config),
    # BLIP-2's: Transformers' is whole, and takes pictures of whole patches.
    "eva01": Case({}, table=4, model=Blip2VisionModel, config=Blip2VisionConfig, theirs={"intermediate_size": FFN}),
    "eva01-class": Case(
        {"class_feature": True, "post_layernorm_epsilon": 1e-5}, 3, 3, Blip2VisionModel, Blip2VisionConfig,
        {"intermediate_size": FFN},
    ),
    "eva02": Case({"ffn_hidden_size": 58}, 2),
    "eva02-last": Case({"ffn_hidden_size": 58, "post_layernorm": True, "rotary_grid": 5}),
}  # fmt: skip


def made_recipe(name: str, **more: Any) -> Recipe:
    """Return the recipe of a case at this job's tensor-parallel size."""
    case = CASES[name]
    vision = {
        "preset": f"{name.partition('-')[0]}_vit" if name.startswith("eva") else "dinov2_vit",
        "image_size": IMAGE, "patch_size": PATCH,
        "hidden_size": WIDTH, "ffn_hidden_size": FFN, "num_layers": case.layers, "num_attention_heads": HEADS,
        "positional_grid": case.table, **case.ours, **more,
    }  # fmt: skip
    if "num_register_tokens" in case.theirs:
        vision["register_tokens"] = case.theirs["num_register_tokens"]
    size = mpu.get_tensor_model_parallel_world_size()
    return recipe(model={"preset": "tiny", "vision": vision}, parallel={"tensor_model_parallel_size": size})


def model_of(name: str, **more: Any) -> ModelConfig:
    """Return the model of a case."""
    return made_recipe(name, **more).model


def reference_of(name: str) -> nn.Module:
    """Return what a case is compared with."""
    case = CASES[name]
    if case.model is None:
        ffn, reference = case.ours["ffn_hidden_size"], case.ours.get("rotary_grid", 16)
        model: nn.Module = Eva02(WIDTH, LAYERS, HEADS, ffn, PATCH, case.table, reference)
    else:
        config = case.config(
            hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, patch_size=PATCH,
            image_size=case.table * PATCH, **case.theirs,
        )  # fmt: skip
        model = case.model(config)
        if "post_layernorm_epsilon" in case.ours:
            model.post_layernorm.eps = case.ours["post_layernorm_epsilon"]
    fill(model)
    return model


def built(name: str, **more: Any) -> nn.Module:
    """Return our tower of this rank."""
    made = made_recipe(name, **more)
    return VISION.find(made.model.vision.preset).build(made.model.vision, build_context(made))


def tower_map(state: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """Return the reference's tensors in our names and layouts."""
    if case.model is Blip2VisionModel:
        return _eva01_map(state, case)
    eva, post = case.model is None, case.ours.get("post_layernorm", False)
    names = (
        {"conv1": "patch_embed.proj"} if eva else {"conv1": "embeddings.patch_embeddings.projection"}
    )  # in front of .weight and .bias
    names |= {"ln_post": "norm" if eva else "layernorm"} if post else {}
    one = {
        "class_embedding": ("cls_token" if eva else "embeddings.cls_token", (0, 0)),
        "positional_embedding": ("pos_embed" if eva else "embeddings.position_embeddings", (0,)),
        "register_embedding": ("embeddings.register_tokens", (0,)),
    }
    out = {mine: state[theirs][at] for mine, (theirs, at) in one.items() if theirs in state}
    for i in range(case.layers):
        mine, theirs = f"transformer.layers.{i}.", f"blocks.{i}." if eva else f"encoder.layer.{i}."
        attn = theirs + ("attn." if eva else "attention.")
        out[mine + "self_attention.linear_qkv.weight"] = qkv(state, attn, "weight", HEADS)
        if eva:
            out[mine + "self_attention.query.bias"] = state[attn + "q_proj.bias"]
            out[mine + "self_attention.value.bias"] = state[attn + "v_proj.bias"]
            names[mine + "self_attention.linear_proj.norm"] = attn + "norm"
            names[mine + "mlp.linear_fc2.norm"] = theirs + "mlp.norm"
        else:
            out[mine + "self_attention.linear_qkv.bias"] = qkv(state, attn, "bias", HEADS)
            out[mine + "self_attn_bda.weight"] = state[theirs + "layer_scale1.lambda1"]
            out[mine + "mlp_bda.weight"] = state[theirs + "layer_scale2.lambda1"]
        gates = ("fc1_g", "fc1_x") if eva else ("gate_proj", "up_proj")
        names[mine + "self_attention.linear_proj"] = attn + ("proj" if eva else "o_proj")
        names |= {mine + "input_layernorm": theirs + "norm1", mine + "pre_mlp_layernorm": theirs + "norm2"}
        gated = f"{theirs}mlp.{gates[0]}.weight" in state
        for kind in ("weight", "bias") if gated else ():
            out[f"{mine}mlp.linear_fc1.{kind}"] = torch.cat([state[f"{theirs}mlp.{gate}.{kind}"] for gate in gates])
        if not gated:
            names[mine + "mlp.linear_fc1"] = theirs + "mlp.fc1"
        names[mine + "mlp.linear_fc2"] = theirs + ("mlp.fc2" if eva or not gated else "mlp.down_proj")
    return out | {f"{a}.{kind}": state[f"{b}.{kind}"] for a, b in names.items() for kind in ("weight", "bias")}


def _eva01_map(state: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """The same of Transformers' Blip2VisionModel, whose key bias has no effect and no place in ours."""
    out = {
        "class_embedding": state["embeddings.class_embedding"][0, 0],
        "positional_embedding": state["embeddings.position_embedding"][0],
    }
    names = {"conv1": "embeddings.patch_embedding", "ln_post": "post_layernorm"}
    for i in range(case.layers):
        mine, theirs = f"transformer.layers.{i}.", f"encoder.layers.{i}."
        attn = theirs + "self_attn.qkv."
        parts = [part.unflatten(0, (HEADS, -1)) for part in state[attn + "weight"].chunk(3)]
        out[mine + "self_attention.linear_qkv.weight"] = torch.cat(parts, dim=1).flatten(0, 1)
        query, _, value = state[attn + "bias"].chunk(3)
        out |= {mine + "self_attention.query.bias": query, mine + "self_attention.value.bias": value}
        names |= {mine + "self_attention.linear_proj": theirs + "self_attn.projection"}
        names |= {mine + "input_layernorm": theirs + "layer_norm1", mine + "pre_mlp_layernorm": theirs + "layer_norm2"}
        names |= {mine + "mlp.linear_fc1": theirs + "mlp.fc1", mine + "mlp.linear_fc2": theirs + "mlp.fc2"}
    return out | {f"{a}.{kind}": state[f"{b}.{kind}"] for a, b in names.items() for kind in ("weight", "bias")}


def features_of(reference: nn.Module, name: str, pixels: Tensor) -> Tensor:
    """Return [N, P, W] of the reference's patches, and of its class token where that is asked for."""
    case = CASES[name]
    post = case.ours.get("post_layernorm", False)
    if isinstance(reference, Eva02):
        x = reference(pixels[..., : case.table * PATCH, : case.table * PATCH], case.layers)
        return (reference.norm(x) if post else x)[:, 1:]
    if isinstance(reference, Blip2VisionModel):
        whole = pixels[..., : 4 * PATCH, : 4 * PATCH]
        x = reference(pixel_values=whole, interpolate_pos_encoding=True).last_hidden_state
        return x[:, int("class_feature" not in case.ours) :]
    out = reference(pixel_values=pixels, output_hidden_states=True)
    x = out.last_hidden_state if post else out.hidden_states[case.layers]
    return x[:, 1 + getattr(reference.config, "num_register_tokens", 0) :]


def compare(name: str) -> None:
    """Compare the features of the patches, and all gradients."""
    case, reference, ours = CASES[name], reference_of(name), built(name)
    load(ours, tower_map(dict(reference.named_parameters()), case))
    pixels = torch.randn(IMAGES, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(8))
    expected, got = features_of(reference, name, pixels), ours(pixels)
    assert got.shape == (16 + int("class_feature" in case.ours), IMAGES, WIDTH)
    close(got.transpose(0, 1), expected, "features")
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9))
    (got.transpose(0, 1) * weights).sum().backward()
    (expected * weights).sum().backward()
    same_gradients(ours, tower_map(gradients_of(reference), case))
