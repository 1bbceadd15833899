"""Towers and connectors whose heads or widths the tensor-parallel ranks do not divide train as on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from run_cases import tensors
from tiny import random_packs, tiny_recipe

from megavlm.checkpoint.slots import Slot
from megavlm.checkpoint.stream import CheckpointReader
from megavlm.config.checks import RecipeError, check_recipe
from megavlm.config.split import is_replicated
from megavlm.planning.layout import layout_of
from megavlm.planning.parameters import chunk_parameters

FP32 = 1e-5
BF16 = 2e-2
VOCABULARY = 512
TP2, TP4, PP2 = (
    {"tensor_model_parallel_size": 2},
    {"tensor_model_parallel_size": 4},
    {"pipeline_model_parallel_size": 2},
)
SP = {"sequence_parallel": True}
VPP2 = {"virtual_pipeline_model_parallel_size": 2}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 9000}
PLAIN = {"use_distributed_optimizer": False}
LANGUAGE = {"hidden_size": 60, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 4}
LANGUAGE |= {"kv_channels": 16, "vocab_size": VOCABULARY, "vocab_divisor": 1, "init_method_std": 0.1}
FIVE = {"num_attention_heads": 5, "hidden_size": 40, "ffn_hidden_size": 67}
FOUR = {"num_attention_heads": 4, "hidden_size": 40, "ffn_hidden_size": 64}


def model(vision: dict[str, Any], connector: dict[str, Any], **language: Any) -> dict[str, Any]:
    tower = {"image_size": 32, "patch_size": 16, "num_layers": 2, "positional_grid": 2, "init_method_std": 0.1}
    if connector.get("preset") is None:
        connector = {"num_queries": 4, **connector}
    return {
        "preset": "tiny",
        "vision": {**tower, **vision},
        "connector": {"init_method_std": 0.1, **connector},
        "language": {**LANGUAGE, **language},
    }


THREE = {"head_dim": 20}
MLP = {"preset": "mlp2x_gelu"}
FROZEN = {"freeze": True}
LORA = {"lora": {"rank": 4, "alpha": 16.0, "targets": ["c_attn", "w1"]}}
INTERN = {"normalization": "RMSNorm", "qk_norm": "width", "layer_scale": True, "add_qkv_bias": False}
MODELS: dict[str, dict[str, Any]] = {
    # Norms over all heads; and Megatron-Core adds up the gradients of the language model's own such norms.
    "intern": {"model": model({**FIVE, **INTERN, "feature_layers": (1, 2)}, MLP, qk_layernorm=True)},
    "both": {"model": model(FIVE, THREE)},
    "tower": {"model": model({**FIVE, "class_token": True, "post_layernorm": True}, MLP)},
    "connector": {"model": model(FOUR, THREE)},
    "wanted": {"model": model({**FOUR, "tensor_parallel": "replicate"}, {**MLP, "tensor_parallel": "replicate"})},
    "recomputed": {"model": model({**FIVE, "gradient_checkpointing": True}, {"preset": "mlp3x_gelu"})},
    "frozen connector": {"model": model(FIVE, THREE), "modules": {"connector": FROZEN}},
    "adapters": {"model": model(FIVE, THREE), "modules": {"vision": FROZEN}, **LORA},
    "all but the head frozen": {"model": model(FIVE, MLP), "modules": {"vision": FROZEN, "connector": FROZEN}},
    "bf16": {"model": model(FIVE, THREE), "training": {"precision": "bf16"}},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "both at TP 2 x PP 2 + SP": ("both", TP2 | PP2 | SP),
    "both at TP 2 x DP 2, overlapped": ("both", TP2 | OVERLAP),
    "both at TP 4": ("both", TP4),
    "both at TP 2 x DP 2, plain optimizer": ("both", TP2 | PLAIN),
    "tower at TP 4 + SP": ("tower", TP4 | SP),
    "tower at TP 2 x PP 2 x VPP 2": ("tower", TP2 | PP2 | VPP2),
    "tower at TP 2 x DP 2, overlapped": ("tower", TP2 | OVERLAP),
    "connector at TP 2 x PP 2 + SP": ("connector", TP2 | PP2 | SP),
    "connector at TP 4": ("connector", TP4),
    "intern at TP 2 x DP 2, overlapped": ("intern", TP2 | OVERLAP),
    "intern at TP 4 + SP": ("intern", TP4 | SP),
    "wanted at TP 2 x DP 2, overlapped": ("wanted", TP2 | OVERLAP),
    "recomputed at TP 4": ("recomputed", TP4),
    "frozen connector at TP 2 x DP 2, overlapped": ("frozen connector", TP2 | OVERLAP),
    "adapters at TP 2 x DP 2, overlapped": ("adapters", TP2 | SP | OVERLAP),
    "language alone at TP 2 x PP 2": ("all but the head frozen", TP2 | PP2),
    "bf16 at TP 2 x DP 2, overlapped": ("bf16", TP2 | OVERLAP),
    "bf16 at TP 2 x PP 2 + SP": ("bf16", TP2 | PP2 | SP),
}
MOVES = [TP2 | PP2 | SP, {}, TP4, TP2 | OVERLAP]
"""Where a run of TP 2 x DP 2 is loaded and saved again, one after the other."""


def branches(name: str, parallel: dict[str, Any]) -> dict[str, Any]:
    own = MODELS[name]
    # Gradients that are zero but for rounding (biases on all keys) make no step of Adam's whole size.
    shared = {"optimizer": {"lr": 1e-3, "clip_grad": 0.5, "weight_decay": 0.1, "adam_eps": 1e-4}}
    return {**shared, **own, "parallel": parallel}


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything of this module lies here."""
    return tmp_path_factory.mktemp("replicas")


@pytest.fixture(scope="module")
def results(tmp: Path) -> dict[str, list[Any]]:
    """Run everything in two starts; return by case what each rank gave."""

    def job(name: str, save: str, parallel: dict[str, Any]) -> dict[str, Any]:
        first = str(tmp / "weights" / name / "step-00000000")
        return {"recipe": branches(name, parallel), "weights": first, "save": str(tmp / save)}

    single = {name: job(name, name, {}) for name in MODELS}
    several = {case: job(name, case, parallel) for case, (name, parallel) in CASES.items()}
    load = tmp / "both at TP 2 x DP 2, overlapped"
    for number, parallel in enumerate(MOVES):
        several[f"moved {number}"] = {"recipe": branches("both", parallel), "load": str(load / "step-00000003")}
        load = tmp / f"moved {number}"
        several[f"moved {number}"]["save"] = str(load)
    found: dict[str, list[Any]] = {}
    for jobs, world in ((single, 1), (several, 4)):
        by_rank = ranks.run("replica_cases:run_jobs", jobs, world=world)
        found |= {name: [given[name] for given in by_rank] for name in jobs}
    return found


def weights(root: Path) -> dict[str, torch.Tensor]:
    reader, found = CheckpointReader(root / "step-00000003"), {}
    for key, entry in reader.tensors().items():
        if not key.startswith("optimizer."):
            found[key] = reader.read(Slot(key, tuple(entry.size))).float()
    return found


def test_micro_batches_hold_none_one_and_many_pictures() -> None:
    """Of what is trained on: none, fewer than ranks, as many as do not divide, and more."""
    counts = {len(pixels) for step in range(3) for _, pixels in random_packs(4, seed=step)}
    assert {0, 1, 2, 3} <= counts


@pytest.mark.long
@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_training_equals_one_process(case: str, results: dict[str, list[Any]], tmp: Path) -> None:
    name = CASES[case][0]
    (expected,) = results[name]
    near = BF16 if name == "bf16" else FP32
    for got in results[case]:
        assert got["loss"] == pytest.approx(expected["loss"], rel=near)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=near)
    whole, parts = weights(tmp / name), weights(tmp / case)
    assert whole.keys() == parts.keys()
    assert any(key.startswith("vision.") for key in whole)
    for key, values in whole.items():
        torch.testing.assert_close(parts[key], values, rtol=near, atol=near, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.long
@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_ranks_hold_equal_copies_and_see_equal_features(case: str, results: dict[str, list[Any]]) -> None:
    name, parallel = CASES[case]
    firsts = [got for got in results[case] if got["features"] is not None]
    assert len(firsts) == (2 if parallel.get("pipeline_model_parallel_size") else 4)
    near = BF16 if name == "bf16" else FP32
    for got in firsts:
        assert got["copies"] == firsts[0]["copies"] and got["copies"]
        if not parallel.get("pipeline_model_parallel_size"):  # whose stages draw from streams of their own
            built = results[name][0]["built"]
            assert all(got["built"][key] == built[key] for key in got["copies"])
        for count, values in results[name][0]["features"].items():
            torch.testing.assert_close(got["features"][count], values, rtol=near, atol=near)


@pytest.mark.long
@pytest.mark.dist
@pytest.mark.parametrize("case", [case for case, (name, _) in CASES.items() if name != "adapters"])
def test_the_planner_counts_the_parameters_of_each_rank(case: str, results: dict[str, list[Any]]) -> None:
    name, parallel = CASES[case]
    recipe = tiny_recipe(**branches(name, parallel))
    layout = layout_of(recipe, 4)
    for got in results[case]:
        counted = [p for chunk in layout.chunks_of(got["stage"]) for p in chunk_parameters(recipe, layout, chunk)]
        assert sum(p.elements for p in counted) == got["parameters"]
        assert sum(p.elements for p in counted if p.learns) == got["learning"]


@pytest.mark.long
@pytest.mark.dist
def test_a_change_of_layout_changes_no_bit(results: dict[str, list[Any]], tmp: Path) -> None:
    """From TP 2 to other layouts, to one tensor-parallel rank, and back, with the optimizer's state."""
    assert "moved 3" in results
    saved = tensors(tmp / "both at TP 2 x DP 2, overlapped" / "step-00000003", VOCABULARY)
    assert any(key.startswith("optimizer.state.exp_avg.vision.") for key in saved)
    for number in range(len(MOVES)):
        assert tensors(tmp / f"moved {number}" / "step-00000003", VOCABULARY) == saved, number


def checked(
    *, vision: dict[str, Any], connector: dict[str, Any], parallel: dict[str, Any], **language: Any
) -> list[bool]:
    recipe = tiny_recipe(model=model(vision, connector, **language), parallel=parallel)
    check_recipe(recipe)
    tensor = recipe.parallel.tensor_model_parallel_size
    return [is_replicated(recipe.model, part, tensor) for part in ("vision", "connector", "language")]


def test_what_divides_is_cut_and_the_rest_is_whole() -> None:
    assert checked(vision=FOUR, connector=MLP, parallel=TP4) == [False, False, False]
    assert checked(vision=FIVE, connector=THREE, parallel={}) == [False, False, False]
    assert checked(vision=FIVE, connector=MLP, parallel=TP2) == [True, False, False]
    assert checked(vision={**FOUR, "ffn_hidden_size": 67}, connector=MLP, parallel=TP2) == [True, False, False]
    assert checked(vision=FOUR, connector=THREE, parallel=TP2) == [False, True, False]
    eight = {"tensor_model_parallel_size": 8}  # more ranks than heads
    wide = {"num_attention_heads": 8, "num_query_groups": 8, "hidden_size": 62}
    assert checked(vision=FOUR, connector=MLP, parallel=eight, **wide) == [True, True, False]
    whole = {"tensor_parallel": "replicate"}
    assert checked(vision={**FOUR, **whole}, connector={**MLP, **whole}, parallel=TP2) == [True, True, False]


@pytest.mark.parametrize(
    ("vision", "connector", "message"),
    [
        (FIVE, MLP, "model.vision.num_attention_heads: 5 is not divisible by parallel.tensor_model_parallel_size (2)"),
        ({**FOUR, "ffn_hidden_size": 67}, MLP, "model.vision.ffn_hidden_size: 67 is not divisible"),
        (FOUR, THREE, "model.connector.head_dim: gives 3 heads, not divisible"),
    ],
)
def test_what_is_to_be_cut_must_divide(vision: dict[str, Any], connector: dict[str, Any], message: str) -> None:
    cut = {"tensor_parallel": "shard"}
    with pytest.raises(RecipeError) as raised:
        checked(vision={**vision, **cut}, connector={**connector, **cut}, parallel=TP2)
    assert str(raised.value).startswith(message)
    assert "tensor_parallel to auto" in str(raised.value)
