"""Predicted weights, gradients and optimizer state are what real models allocate, to 2 %."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import script
from test_flops import resized
from tiny import SEQUENCE_LENGTH, random_packs, tiny_recipe

from megavlm.architectures.decoders.decoder.config import DecoderConfig
from megavlm.config.architecture import LANGUAGE, Architecture
from megavlm.config.errors import UserError
from megavlm.config.split import tensor_ranks
from megavlm.planning.activations import held_by
from megavlm.planning.layout import layout_of
from megavlm.planning.parameters import check_costs, chunk_parameters, static_bytes
from megavlm.planning.stage_flops import chunk_flops

WORKER = Path(__file__).with_name("memory_worker.py")
RANKS = 4
BF16 = {"training": {"precision": "bf16"}}
TORCH = {"transformer_impl": "torch"}
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
# What the tiny model lacks: tied embeddings, norms on queries and keys, grouped heads, a class token, other norms.
OTHER: dict[str, Any] = {
    "preset": "tiny",
    "vision": {"preset": "clip_vit", "image_size": 32, "patch_size": 16, "hidden_size": 48, "num_layers": 2}
    | {"num_attention_heads": 4, "ffn_hidden_size": 96, "positional_grid": 2, "conv_bias": True}
    | {"post_layernorm": True},
    "connector": {"preset": "mlp2x_gelu", "num_queries": None, "head_dim": None},
    "language": {"preset": "qwen3", "hidden_size": 64, "ffn_hidden_size": 96, "num_layers": 4, "vocab_size": 517}
    | {"num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16, "max_position_embeddings": 2048}
    | {"tie_word_embeddings": True},
}
LAYERS: dict[str, Any] = {
    **OTHER,
    "vision": {**OTHER["vision"], "post_layernorm": False, "feature_layers": (2, 0, 1)},
}
"""Features of several layers: the connector begins three times as wide."""
# InternViT-6B's layers, and squares of patches side by side.
INTERNVL: dict[str, Any] = {
    **OTHER,
    "vision": {"preset": "intern_vit", "image_size": 32, "patch_size": 8, "hidden_size": 48, "num_layers": 2}
    | {"num_attention_heads": 4, "ffn_hidden_size": 96, "positional_grid": 4}
    | {"normalization": "RMSNorm", "add_qkv_bias": False, "qk_norm": "width", "class_token": False},
    "connector": {"preset": "pixel_shuffle"},
    "language": {**OTHER["language"], "vocab_size": 512},
}
TP4 = {"tensor_model_parallel_size": 4}
QWEN2: dict[str, Any] = {
    **OTHER,
    "language": {**OTHER["language"], "preset": "qwen2", "num_query_groups": 1, "tie_word_embeddings": False},
}
ADAPTERS: dict[str, Any] = {
    "lora": {"rank": 8, "targets": ("q_proj", "v_proj", "o_proj")},
    "modules": {"vision": {"freeze": True}, "connector": {"freeze": True}},
}
EXPERT_ADAPTERS: dict[str, Any] = {
    **ADAPTERS,
    "lora": {"rank": 8, "targets": ("q_proj", "gate_proj", "up_proj", "experts.down_proj")},
}
FIVE_HEADS = {"hidden_size": 40, "num_attention_heads": 5, "ffn_hidden_size": 67}
WHOLE: dict[str, Any] = {
    **OTHER,
    "vision": {"image_size": 32, "patch_size": 16, "num_layers": 2, "positional_grid": 4, **FIVE_HEADS},
    "connector": {"num_queries": 4, "head_dim": 20},
    "language": {**OTHER["language"], "hidden_size": 60, "vocab_size": 512},
}
WHOLE_TOWER: dict[str, Any] = {
    **WHOLE, "vision": {**OTHER["vision"], **FIVE_HEADS}, "connector": {"preset": "mlp2x_gelu"}
}  # fmt: skip
# Convolutions, norms over channels and gates, all of which a rank has whole but for what is cut; pictures at two sizes.
LDP: dict[str, Any] = {**INTERNVL, "connector": {"preset": "ldpnet"}}
ABSTRACTOR: dict[str, Any] = {
    **INTERNVL,
    "connector": {"preset": "c_abstractor", "output_grid": 2, "hidden_size": 32},
}
S2: dict[str, Any] = {
    **INTERNVL,
    "vision": {**INTERNVL["vision"], "s2_scales": (16, 32), "positional_grid": 2},
    "connector": {"preset": "mlp2x_gelu"},
}
# A norm with bias for attention and MLP side by side, biases everywhere, no gate, half a head turned.
PHI: dict[str, Any] = {
    **INTERNVL,
    "language": {**INTERNVL["language"], "preset": "phi", "tie_word_embeddings": False},
}
# Norms of queries and keys too, and one behind attention; two layers behind the queries of a Q-Former.
TINYGPT: dict[str, Any] = {
    **INTERNVL,
    "connector": {"preset": "q_former", "num_queries": 4, "num_layers": 3, "hidden_size": 32, "num_attention_heads": 4}
    | {"ffn_hidden_size": 64, "trained": "projection", "projection_hidden_size": 48},
    "language": {**PHI["language"], "qk_layernorm": True, "attention_branch_norm": True},
}
NORM_ADAPTERS: dict[str, Any] = {
    "lora": {"rank": 4, "targets": ("q_proj", "dense"), "train_norms": True},
    "checkpoint": {"load": "."},
}
# Norms around 1, GeGLU, one key/value head, multipliers.
GEMMA: dict[str, Any] = {
    **INTERNVL,
    "language": {**INTERNVL["language"], "preset": "gemma", "embedding_multiplier": 8.0, "residual_multiplier": 0.5},
}
# Norms behind the branches too, and two rotary tables; windows that no segment leaves (their masks are a CPU's alone).
GEMMA3: dict[str, Any] = {
    **INTERNVL,
    "language": {**INTERNVL["language"], "preset": "gemma3_text", "sliding_window": 512},
}
# Register tokens, a gate and layer scale; then norms inside, biases of some, and angles.
DINOV2: dict[str, Any] = {
    **INTERNVL,
    "vision": {"preset": "dinov2_vit", "image_size": 32, "patch_size": 8, "hidden_size": 48, "num_layers": 2}
    | {"num_attention_heads": 4, "ffn_hidden_size": 96, "positional_grid": 4, "gated_mlp": True, "activation": "silu"},
}
EVA02: dict[str, Any] = {
    **INTERNVL,
    "vision": {"preset": "eva02_vit", "image_size": 32, "patch_size": 8, "hidden_size": 48, "num_layers": 2}
    | {"num_attention_heads": 4, "ffn_hidden_size": 90, "positional_grid": 4},
}
# A class token's feature in front of the patches'; BERT layers of which half look at them; the last layer alone learns.
Q_FORMER: dict[str, Any] = {
    **INTERNVL,
    "vision": {"preset": "eva01_vit", "image_size": 32, "patch_size": 8, "hidden_size": 48, "num_layers": 2}
    | {"num_attention_heads": 4, "ffn_hidden_size": 96, "positional_grid": 4, "class_feature": True},
    "connector": {"preset": "q_former", "num_queries": 4, "num_layers": 3, "hidden_size": 32, "num_attention_heads": 4}
    | {"ffn_hidden_size": 64, "trained": "projection"},
}
# Experts behind an MLP; and in all layers, biased, with a shared expert.
EP2 = {"expert_model_parallel_size": 2}
EXPERTS: dict[str, Any] = {
    **OTHER,
    "language": {**OTHER["language"], "preset": "qwen3_moe", "num_moe_experts": 4, "moe_router_topk": 2}
    | {"moe_ffn_hidden_size": 40, "moe_layer_freq": (0, 1, 1, 1), "vocab_size": 512, "tie_word_embeddings": False},
}
SHARED: dict[str, Any] = {
    **EXPERTS,
    "language": {**EXPERTS["language"], "moe_layer_freq": 1, "moe_shared_expert_intermediate_size": 48}
    | {"moe_shared_expert_gate": True, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
}
# Latent attention: queries of a latent, values narrower than keys, an MLP in front of experts.
LATENT: dict[str, Any] = {
    **OTHER,
    "language": {**OTHER["language"], "preset": "deepseek_v2", "num_moe_experts": 4, "moe_router_topk": 2}
    | {"moe_ffn_hidden_size": 40, "moe_layer_freq": (0, 1, 1, 1), "moe_shared_expert_intermediate_size": 48}
    | {"num_query_groups": 4, "kv_channels": 24, "rotary_percent": 1 / 3, "v_head_dim": 20, "kv_lora_rank": 40}
    | {"q_lora_rank": 28, "vocab_size": 512, "tie_word_embeddings": False},
}
LATENT_ADAPTERS: dict[str, Any] = {
    **ADAPTERS,
    "lora": {"rank": 8, "targets": ("q_b_proj", "kv_b_proj", "o_proj", "mlp.up_proj"), "train_norms": True},
    "checkpoint": {"load": "."},
}
CASES: dict[str, dict[str, Any]] = {
    "tp2-pp2-sp": {**BF16, "parallel": {**TP2, **PP2, **TORCH, "sequence_parallel": True}},
    "tp2-pp2": {**BF16, "parallel": {**TP2, **PP2, **TORCH}},
    "pp2-uneven-dp2": {**BF16, "parallel": {**PP2, "num_layers_in_first_pipeline_stage": 1}},
    "pp2-vpp2-dp2-overlap": {
        **BF16,
        "parallel": {**PP2, "virtual_pipeline_model_parallel_size": 2, "overlap_grad_reduce": True},
    },
    "tp2-dp2-frozen": {**BF16, "parallel": TP2, "modules": {"vision": {"freeze": True}, "language": {"freeze": True}}},
    "tp2-dp2-plain-optimizer": {**BF16, "parallel": {**TP2, "use_distributed_optimizer": False}},
    "dp4-fp32": {},
    "other-pp2-vpp2-dp2": {
        **BF16,
        "model": OTHER,
        "parallel": {**PP2, "virtual_pipeline_model_parallel_size": 2},
    },
    "other-tp2-dp2": {**BF16, "model": OTHER, "parallel": TP2},
    "layers-tp2-pp2": {**BF16, "model": LAYERS, "parallel": {**TP2, **PP2, **TORCH}},
    "internvl-tp2-pp2-sp": {**BF16, "model": INTERNVL, "parallel": {**TP2, **PP2, **TORCH, "sequence_parallel": True}},
    "ldp-tp2-pp2": {**BF16, "model": LDP, "parallel": {**TP2, **PP2, **TORCH}},
    "abstractor-tp2-pp2-sp": {
        **BF16,
        "model": ABSTRACTOR,
        "parallel": {**TP2, **PP2, **TORCH, "sequence_parallel": True},
    },
    "q-former-tp2-pp2": {**BF16, "model": Q_FORMER, "parallel": {**TP2, **PP2, **TORCH}},
    "s2-tp2-pp2": {**BF16, "model": S2, "parallel": {**TP2, **PP2, **TORCH}},
    "phi-tp2-pp2": {**BF16, "model": PHI, "parallel": {**TP2, **PP2, **TORCH}},
    "phi-norms-tp2-pp2-sp": {"model": TINYGPT, "parallel": {**TP2, **PP2, **TORCH, "sequence_parallel": True}},
    "phi-norms-adapters": {**BF16, "model": TINYGPT, "parallel": {**TP2, **PP2, **TORCH}, **NORM_ADAPTERS},
    "phi-tp2-pp2-sp": {"model": PHI, "parallel": {**TP2, **PP2, **TORCH, "sequence_parallel": True}},
    "gemma-tp2-pp2-sp": {**BF16, "model": GEMMA, "parallel": {**TP2, **PP2, **TORCH, "sequence_parallel": True}},
    "gemma3-tp2-pp2": {**BF16, "model": GEMMA3, "parallel": {**TP2, **PP2, **TORCH}},
    "dinov2-tp2-pp2": {**BF16, "model": DINOV2, "parallel": {**TP2, **PP2, **TORCH}},
    "eva02-tp2-pp2": {**BF16, "model": EVA02, "parallel": {**TP2, **PP2, **TORCH}},
    "experts-tp2-pp2-ep2-sp": {
        **BF16,
        "model": EXPERTS,
        "parallel": {**TP2, **PP2, **EP2, **TORCH, "sequence_parallel": True},
    },
    "experts-ep4-fp32": {"model": EXPERTS, "parallel": {"expert_model_parallel_size": 4}},
    "experts-shared-ep2": {**BF16, "model": SHARED, "parallel": {**EP2, **TORCH}},
    "experts-shared-pp2-ep2-plain": {
        **BF16,
        "model": SHARED,
        "parallel": {**PP2, **EP2, **TORCH, "use_distributed_optimizer": False},
    },
    "experts-adapters": {
        **BF16,
        "model": EXPERTS,
        "parallel": {**TP2, **EP2, **TORCH, "sequence_parallel": True},
        **EXPERT_ADAPTERS,
    },
    "latent-tp2-pp2-ep2-sp": {
        **BF16,
        "model": LATENT,
        "parallel": {**TP2, **PP2, **EP2, **TORCH, "sequence_parallel": True},
    },
    "latent-adapters": {
        **BF16,
        "model": LATENT,
        "parallel": {**TP2, **EP2, **TORCH, "sequence_parallel": True},
        **LATENT_ADAPTERS,
    },
    # Two ranks share each key/value head; with and without norms that read what is gathered, and adapters.
    "shared-heads": {**BF16, "model": OTHER, "parallel": {**TP4, **TORCH}},
    "shared-heads-sp-fp32": {"model": OTHER, "parallel": {**TP4, "sequence_parallel": True}},
    "shared-heads-qwen2-fp32": {"model": QWEN2, "parallel": TP4},
    "shared-heads-adapters": {**BF16, "model": QWEN2, "parallel": {**TP4, **TORCH}, **ADAPTERS},
    # Heads and widths that the ranks do not divide: each holds all of tower and connector, or of the tower alone.
    "whole-tp2-pp2": {**BF16, "model": WHOLE, "parallel": {**TP2, **PP2, **TORCH}},
    "whole-tp4-sp": {"model": WHOLE_TOWER, "parallel": {**TP4, "sequence_parallel": True}},
    "whole-tp2-dp2": {**BF16, "model": WHOLE, "parallel": {**TP2, "overlap_grad_reduce": True}},
}
COUNTED = ["tp2-pp2-sp", "tp2-pp2", "whole-tp2-pp2", "internvl-tp2-pp2-sp", "phi-tp2-pp2"]
COUNTED += ["ldp-tp2-pp2", "abstractor-tp2-pp2-sp", "s2-tp2-pp2"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[float]]]:
    """Bytes of weights, gradients, optimizer and kept activations, and images, per rank of each stage."""
    tmp = tmp_path_factory.mktemp("memory")
    job, out = tmp / "job.json", tmp / "out.json"
    job.write_text(json.dumps([{"branches": one, "count": name in COUNTED} for name, one in CASES.items()]))
    script(WORKER, job, out, world=RANKS, timeout=600)
    return dict(zip(CASES, json.loads(out.read_text()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_static_bytes_are_those_of_the_real_model(name: str, measured: dict[str, list[list[float]]]) -> None:
    recipe = tiny_recipe(**CASES[name])
    layout = layout_of(recipe, RANKS)
    assert len(measured[name]) == layout.pipeline
    for stage, real in enumerate(measured[name]):
        predicted = static_bytes(recipe, layout, stage)
        assert [predicted.weights, predicted.gradients, predicted.optimizer] == pytest.approx(real[:3], rel=0.02), stage
        # Weights and gradients to the byte, padding included.
        assert [predicted.weights, predicted.gradients] == real[:2]


KEPT = ["tp2-pp2-sp", "tp2-pp2", "layers-tp2-pp2", "whole-tp2-pp2", "whole-tp4-sp", "internvl-tp2-pp2-sp"]
KEPT += [name for name in CASES if name.startswith(("phi", "gemma", "experts", "latent"))]
KEPT += [name for name in CASES if "shared" in name or name.startswith(("ldp", "abstractor", "s2", "dino", "eva"))]


@pytest.mark.parametrize("name", KEPT)
def test_activations_are_those_of_the_real_stages(name: str, measured: dict[str, list[list[float]]]) -> None:
    recipe = tiny_recipe(**CASES[name])
    layout = layout_of(recipe, RANKS)
    images = round(measured[name][0][4])
    assert images > 0
    for chunk, real in zip(layout.chunks, measured[name], strict=True):
        assert held_by(recipe, layout, chunk, SEQUENCE_LENGTH, images).kept == pytest.approx(real[3], rel=0.02)


@pytest.mark.parametrize("name", COUNTED)
def test_operations_of_a_stage_are_those_that_torch_counts(name: str, measured: dict[str, list[list[float]]]) -> None:
    recipe = tiny_recipe(**CASES[name])
    layout, language = layout_of(recipe, RANKS), recipe.model.language
    pack, _ = random_packs(1)[0]
    squares = sum(int(length) ** 2 for length in np.diff(pack.cu_seqlens))
    images = round(measured[name][0][4])
    for chunk, real in zip(layout.chunks, measured[name], strict=True):
        work = chunk_flops(recipe, layout, chunk, tokens=SEQUENCE_LENGTH, squared_lengths=squares, images=images)
        # torch counts the whole square of attention, and the projection of the queries, once for all images.
        queries = getattr(recipe.model.connector, "num_queries", 0) or 0
        sharing = tensor_ranks(recipe.model, "connector", layout.tensor)
        once = 2 * queries * language.hidden_size**2 // sharing * int(chunk.first)
        if chunk.first:  # and fits two tables of positions to the grid
            vision = recipe.model.vision
            once += resized(vision.positional_grid**2, vision.patches_per_image, vision.hidden_size)
            once += resized(queries, vision.patches_per_image, language.hidden_size)
        assert language.vocab_size % (language.vocab_divisor * layout.tensor) == 0  # no padding to count
        assert work.total + work.attention + once == real[5]


def test_the_14b_has_the_parameters_that_its_presets_say() -> None:
    # Facts pages A, B, C: language model, tower, connector.
    recipe = tiny_recipe(model={"preset": "codefuse_vl_14b", "vision": {}, "connector": {}, "language": {}})
    layout = layout_of(recipe, 1)
    found = chunk_parameters(recipe, layout, layout.chunks[0])
    total = {name: sum(p.elements for p in found if p.module == name) for name in ("vision", "connector", "language")}
    assert total == {"vision": 1_842_770_688, "connector": 142_264_320, "language": 14_167_290_880}


def test_a_module_of_another_package_is_refused() -> None:
    recipe = tiny_recipe()
    LANGUAGE.register("theirs", Architecture("theirs", DecoderConfig, "theirs.decoder:build"))
    try:
        other = tiny_recipe(
            model={"preset": "tiny", "language": {**recipe.model.language.__dict__, "preset": "theirs"}}
        )
        with pytest.raises(UserError, match=r"model\.language\.preset: .*'theirs' has no figures of its cost"):
            check_costs(other.model)
    finally:
        del LANGUAGE._presets["theirs"]


@pytest.mark.parametrize(
    ("quantize", "shape"), [(None, "dense"), ("nf4", "dense"), (None, "experts"), ("nf4", "experts")]
)
def test_adapters_are_counted_as_they_are_built(quantize: str | None, shape: str) -> None:
    """And quantised weights with the bytes that they really take."""
    from megavlm.architectures.adapters import frozen_linears
    from megavlm.layers.nf4 import quantise
    from megavlm.models.build import build_model, unwrap
    from megavlm.parallel.state import process_groups

    freeze = {"vision": {"freeze": True}, "connector": {"freeze": True}}
    own: dict[str, Any] = {"model": SHARED} if shape == "experts" else {}
    targets = ("q_proj", "o_proj", "up_proj", "down_proj") if own else ("c_attn", "c_proj", "w1")
    lora = {"rank": 4, "targets": targets, "train_head": True}
    recipe = tiny_recipe(lora={**lora, "quantize": quantize}, modules=freeze, **own)
    layout = layout_of(recipe, 1)
    parameters = chunk_parameters(recipe, layout, layout.chunks_of(0)[0])
    with process_groups(recipe.parallel, 1):
        model = unwrap(build_model(recipe, 500)[0])
    found = list(model.parameters())
    assert sum(p.elements for p in parameters if p.learns) == sum(p.numel() for p in found if p.requires_grad)
    assert sum(p.elements for p in parameters if not p.quantised) == sum(p.numel() for p in found)
    shapes = [(layer.output_size, layer.input_size) for *_, layer in frozen_linears(model.language)]
    packed = sum(quantise(torch.randn(shape), [(0, shape[0])], transposed=False).nbytes for shape in shapes)
    plain = tiny_recipe(lora=lora, modules=freeze, **own)
    saved = static_bytes(plain, layout, 0).weights - static_bytes(recipe, layout, 0).weights
    full = 4 * sum(a * b for a, b in shapes)
    assert saved == (0 if quantize is None else pytest.approx(full - packed, rel=0.002))


@pytest.mark.parametrize("model", [EXPERTS, SHARED, LATENT])
def test_adapters_of_experts_cost_what_a_token_goes_through(model: dict[str, Any]) -> None:
    """Of experts, those that it is sent to and the shared ones; of a layer that has none, its MLP's."""
    from megavlm.models.build import build_model, unwrap
    from megavlm.parallel.state import process_groups
    from megavlm.planning.flops import adapter_flops

    own = tiny_recipe(
        model=model,
        lora={"rank": 4, "targets": ("all-linear",)},
        modules={"vision": {"freeze": True}, "connector": {"freeze": True}},
    )
    with process_groups(own.parallel, 1):
        built = unwrap(build_model(own, 500)[0])
    language, expected = own.model.language, 0.0
    for name, parameter in built.named_parameters():
        if name.endswith((".lora_a", ".lora_b")):
            share = language.moe_router_topk / language.num_moe_experts if ".local_experts." in name else 1
            expected += share * parameter.numel()
    assert adapter_flops(language, own.lora, 7) == 2 * 7 * expected > 0
