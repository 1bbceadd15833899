"""Every layout trains like one process: same weights, same global batch, same losses and gradient norms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import script

WORKER = Path(__file__).with_name("layout_worker.py")
FP32 = 1e-5
BF16 = 2e-2  # bf16 has 8 bits of mantissa; sums are made in another order

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "tp2-pp2-sp": (
        4,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "dp2": (2, {}),
    "dp2-overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "dp2-plain-optimizer": (2, {"use_distributed_optimizer": False}),
    "pp2-vpp2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "pp2-uneven": (2, {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1}),
    "pp4-packed": (4, {"pipeline_model_parallel_size": 4}),
    "tp2-sp-recompute-full": (
        2,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "recompute_granularity": "full"},
    ),
    "pp2-recompute-selective": (2, {"pipeline_model_parallel_size": 2, "recompute_granularity": "selective"}),
}

# Everything that the tiny model lacks and that layouts may get wrong: an embedding tied between the first and the last
# stage, norms on each rank's own queries and keys, grouped key/value heads, a class token, norms behind the tower.
OTHER_MODEL: dict[str, Any] = {
    "preset": "tiny",
    "vision": {"preset": "clip_vit", "image_size": 32, "patch_size": 8, "hidden_size": 48, "num_layers": 2}
    | {"num_attention_heads": 4, "ffn_hidden_size": 96, "positional_grid": 2, "activation": "quick_gelu"}
    | {"conv_bias": True, "post_layernorm": True, "init_method_std": 0.1},
    "connector": {"num_queries": 4, "head_dim": 16},
    "language": {"preset": "qwen3", "hidden_size": 64, "ffn_hidden_size": 96, "num_layers": 4, "vocab_size": 517}
    | {"num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16, "max_position_embeddings": 2048}
    | {"tie_word_embeddings": True, "init_method_std": 0.2},
}
OTHER_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": LAYOUTS["tp2"],
    "tp4-sp-shared-heads": (4, {"tensor_model_parallel_size": 4, "sequence_parallel": True}),
    "tp2-pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "tp2-pp2-sp": LAYOUTS["tp2-pp2-sp"],
    "pp2-vpp2": LAYOUTS["pp2-vpp2"],
    "dp2-pp2-overlap": (4, {"pipeline_model_parallel_size": 2, **LAYOUTS["dp2-overlap"][1]}),
}


LAYERS_MODEL: dict[str, Any] = {
    "preset": "tiny",
    "vision": {**OTHER_MODEL["vision"], "post_layernorm": False, "feature_layers": (1, 2)}
    | {"gradient_checkpointing": True, "patch_size": 16},
    "connector": {"preset": "mlp2x_gelu", "num_queries": None, "head_dim": None, "init_method_std": 0.1},
    "language": OTHER_MODEL["language"],
}
"""Features of two layers of the tower, side by side."""


def run(tmp: Path, name: str, ranks: int, recipe: dict[str, Any], weights: Path) -> dict[str, list[float]]:
    """Train 3 steps; return losses and gradient norms."""
    job, out = tmp / f"{name}.job.json", tmp / f"{name}.json"
    job.write_text(json.dumps({"recipe": recipe, "weights": str(weights), "out": str(out)}))
    script(WORKER, job, world=ranks)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    """Return the initial weights and the losses of one process in fp32."""
    tmp = tmp_path_factory.mktemp("single")
    weights = tmp / "step-00000000"
    return weights, run(tmp, "single", 1, {}, weights)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name: str, single: tuple[Path, dict[str, list[float]]], tmp_path: Path) -> None:
    weights, expected = single
    ranks, parallel = LAYOUTS[name]
    got = run(tmp_path, name, ranks, {"parallel": parallel}, weights)
    assert got["loss"] == pytest.approx(expected["loss"], rel=FP32)
    assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=FP32)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    """Return the same of the other model."""
    tmp = tmp_path_factory.mktemp("other")
    weights = tmp / "step-00000000"
    return weights, run(tmp, "other", 1, {"model": OTHER_MODEL}, weights)


@pytest.mark.parametrize("name", OTHER_LAYOUTS)
def test_another_model_equals_one_process(
    name: str, other: tuple[Path, dict[str, list[float]]], tmp_path: Path
) -> None:
    weights, expected = other
    ranks, parallel = OTHER_LAYOUTS[name]
    got = run(tmp_path, name, ranks, {"model": OTHER_MODEL, "parallel": parallel}, weights)
    assert got["loss"] == pytest.approx(expected["loss"], rel=FP32)
    assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=FP32)


def test_features_of_several_layers_equal_one_process(tmp_path: Path) -> None:
    """With the layers recomputed in their backward passes at the one, and not at the other."""
    weights, vision = tmp_path / "step-00000000", {**LAYERS_MODEL["vision"], "gradient_checkpointing": False}
    expected = run(tmp_path, "single", 1, {"model": {**LAYERS_MODEL, "vision": vision}}, weights)
    ranks, parallel = LAYOUTS["tp2-pp2-sp"]
    got = run(tmp_path, "layers", ranks, {"model": LAYERS_MODEL, "parallel": parallel}, weights)
    assert got["loss"] == pytest.approx(expected["loss"], rel=FP32)
    assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=FP32)


@pytest.mark.parametrize("name", ["tp2-pp2-sp", "dp2"])
def test_bf16_with_fp32_masters(name: str, single: tuple[Path, dict[str, list[float]]], tmp_path: Path) -> None:
    weights, expected = single
    ranks, parallel = LAYOUTS[name]
    got = run(tmp_path, name, ranks, {"parallel": parallel, "training": {"precision": "bf16"}}, weights)
    assert got["loss"] == pytest.approx(expected["loss"], rel=BF16)
    assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=BF16)


def test_three_steps_learn(single: tuple[Path, dict[str, list[float]]]) -> None:
    _, expected = single
    assert len(set(expected["loss"])) == 3
    assert all(norm > 0 for norm in expected["grad_norm"])
