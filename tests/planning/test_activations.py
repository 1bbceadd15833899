"""Predicted activations are what autograd keeps in the plain-torch layers, to 2 %."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from saved_tensors import quantise_random, saved_tensors
from test_parameters import EXPERTS, LATENT, LAYERS, OTHER, SHARED
from tiny import IMAGE_TOKEN, SEQUENCE_LENGTH, random_packs, tiny_recipe

from megavlm.data.device_batch import make_batch
from megavlm.models.build import build_model, unwrap
from megavlm.parallel.state import process_groups
from megavlm.planning.activations import held_by
from megavlm.planning.layout import layout_of

FROZEN = {"freeze": True}
TORCH = {"transformer_impl": "torch"}
BF16 = {"training": {"precision": "bf16"}, "parallel": TORCH}
CHECKPOINTED = {**tiny_recipe().model.vision.__dict__, "gradient_checkpointing": True}
BESIDE = {"vision": FROZEN, "connector": FROZEN}
QWEN = {"rank": 8, "targets": ("c_attn", "attn.c_proj", "w1", "w2")}
PARTS = {"rank": 8, "targets": ("q_proj", "v_proj", "up_proj")}
MANY = {"num_moe_experts": 16, "moe_router_topk": 4, "moe_layer_freq": 1}
LOSSES = {"moe_aux_loss_coeff": 0.01, "moe_z_loss_coeff": 0.001}


MAMBA: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "time_step_rank": 5, "num_layers": 3}
MAMBA = {"preset": "tiny", "language": {"preset": "mamba", **MAMBA, "vocab_size": 512}}


def told(model: dict[str, Any], **language: Any) -> dict[str, Any]:
    return {**model, "language": {**model["language"], **language}}


ALL = {"rank": 8, "targets": ("all-linear",)}
CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": BF16,
    "selective": {**BF16, "parallel": {**TORCH, "recompute_granularity": "selective"}},
    "full": {"parallel": {"recompute_granularity": "full"}},
    "full-by-two": {"parallel": {"recompute_granularity": "full", "recompute_num_layers": 2}},
    "frozen-tower": {**BF16, "modules": {"vision": FROZEN}},
    "connector-alone": {**BF16, "modules": {"vision": FROZEN, "language": FROZEN}},
    "tower-alone": {"modules": {"connector": FROZEN, "language": FROZEN}},
    "checkpointed-tower": {"model": {"preset": "tiny", "vision": CHECKPOINTED}},
    "other": {"model": OTHER},
    "other-bf16": {**BF16, "model": OTHER},
    "layers": {"model": LAYERS},
    "layers-frozen-tower": {"model": LAYERS, "modules": {"vision": FROZEN}},
    "layers-checkpointed": {"model": {**LAYERS, "vision": {**LAYERS["vision"], "gradient_checkpointing": True}}},
    "lora": {"lora": QWEN, "modules": BESIDE},
    "lora-bf16-selective": {
        **BF16,
        "parallel": {**TORCH, "recompute_granularity": "selective"},
        "lora": QWEN,
        "modules": BESIDE,
    },
    "lora-everywhere": {"lora": {"rank": 8, "targets": ("c_attn", "c_proj", "w1", "w2")}, "modules": BESIDE},
    "lora-head-connector": {**BF16, "lora": {**QWEN, "train_head": True}, "modules": {"vision": FROZEN}},
    "lora-of-parts": {"model": OTHER, "lora": PARTS, "modules": BESIDE},
    "lora-of-parts-bf16": {**BF16, "model": OTHER, "lora": PARTS, "modules": BESIDE},
    "experts": {"model": told(EXPERTS, **MANY)},
    "experts-bf16-losses": {**BF16, "model": told(EXPERTS, **MANY, **LOSSES)},
    "experts-shared-losses-capacity": {"model": told(SHARED, **LOSSES, moe_expert_capacity_factor=1.25)},
    "experts-frozen": {"model": EXPERTS, "modules": {"language": FROZEN}},
    "lora-of-experts": {"model": EXPERTS, "lora": ALL, "modules": BESIDE},
    "lora-of-shared-experts": {"model": SHARED, "lora": ALL, "modules": BESIDE},
    "qlora-of-shared-experts": {**BF16, "model": SHARED, "lora": {**PARTS, "quantize": "nf4"}, "modules": BESIDE},
    "lora-of-experts-bf16": {**BF16, "model": EXPERTS, "lora": PARTS, "modules": BESIDE},
    "latent": {"model": LATENT},
    "latent-bf16-stream": {**BF16, "model": told(LATENT, q_lora_rank=None, moe_layer_freq=1)},
    "latent-selective": {"model": LATENT, "parallel": {"recompute_granularity": "selective"}},
    "lora-of-latent": {**BF16, "model": LATENT, "lora": ALL, "modules": BESIDE},
    "mamba": {"model": MAMBA},
    "mamba-bf16": {**BF16, "model": MAMBA},
    "mamba-full": {"model": MAMBA, "parallel": {"recompute_granularity": "full"}},
    "lora-of-mamba": {**BF16, "model": MAMBA, "lora": ALL, "modules": BESIDE},
    "qlora": {**BF16, "lora": {**QWEN, "quantize": "nf4"}, "modules": BESIDE},
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_kept_is_what_autograd_keeps(name: str) -> None:
    recipe = tiny_recipe(**CASES[name])
    with process_groups(recipe.parallel, seed=1):
        model = build_model(recipe, IMAGE_TOKEN)[0]
        quantise_random(unwrap(model).language)
        pack, pixels = random_packs(1, seed=3)[0]
        batch = make_batch(pack, torch.from_numpy(pixels), torch.device("cpu"))
        assert batch.num_images > 0
        with saved_tensors(model.parameters()) as saved:
            model(
                tokens=batch.tokens,
                position_ids=batch.position_ids,
                packed_seq_params=batch.packed_seq_params,
                labels=batch.labels.clamp(min=0),
                images=batch.images,
            )
        layout = layout_of(recipe, 1)
        held = held_by(recipe, layout, layout.chunks[0], SEQUENCE_LENGTH, batch.num_images)
        assert held.kept == pytest.approx(saved.bytes, rel=0.02)
