"""Adapters at any layout train as in one process, leave frozen weights as they are, and go on exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launch import torchrun

WORKER = Path(__file__).with_name("lora_worker.py")
FP32 = 1e-5

TP2 = {"tensor_model_parallel_size": 2}
TP2_PP2_SP = {**TP2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2-pp2-sp": (4, TP2_PP2_SP),
    "dp2-pp2-vpp2-overlap": (
        4,
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
        | {"overlap_grad_reduce": True, "overlap_param_gather": True},
    ),
    "tp2-recompute": (2, {**TP2, "recompute_granularity": "full"}),
}
# Grouped queries, norms on queries and keys, one weight for embedding and output layer; adapters on some of q, k, v and
# of gate and up.
GROUPED: dict[str, Any] = {
    "preset": "tiny",
    "vision": {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_layers": 2}
    | {"num_attention_heads": 4, "ffn_hidden_size": 96, "positional_grid": 2},
    "connector": {"num_queries": 4, "head_dim": 16},
    "language": {"preset": "qwen3", "hidden_size": 64, "ffn_hidden_size": 96, "num_layers": 4, "vocab_size": 517}
    | {"num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 16, "max_position_embeddings": 2048}
    | {"tie_word_embeddings": True, "init_method_std": 0.2},
}
FREEZE = {"vision": {"freeze": True}}
QWEN = {"rank": 4, "alpha": 16.0, "targets": ["c_attn", "attn.c_proj", "w1", "w2"]}
SOME = {"rank": 4, "targets": ["q_proj", "v_proj", "up_proj", "down_proj"]}
PLAIN = {"lora": QWEN | {"train_embeddings": True, "train_head": True}, "modules": FREEZE}
PARTS = {"lora": SOME, "modules": FREEZE, "model": GROUPED}
RESUMED = {
    "lora": QWEN | {"targets": ["c_attn", "c_proj", "w1"]},
    "modules": FREEZE,
    "optimizer": {"schedule": "constant"},
}
HALF = {**RESUMED, "training": {"train_steps": 2}}
# Shards of whole groups of 64 x 256 weights at TP 2.
WIDE: dict[str, Any] = {
    "preset": "tiny",
    "vision": GROUPED["vision"],
    "connector": {"num_queries": 4, "head_dim": 64},
    "language": {"hidden_size": 256, "ffn_hidden_size": 384, "num_attention_heads": 4, "num_query_groups": 4}
    | {"kv_channels": 64, "num_layers": 2, "init_method_std": 0.1},
}
QLORA = {
    "lora": QWEN | {"targets": ["c_attn", "w1", "mlp.c_proj"], "quantize": "nf4"},
    "modules": FREEZE,
    "model": WIDE,
}
Results = dict[str, dict[str, Any]]


def run(tmp: Path, ranks: int, jobs: dict[str, dict[str, Any]]) -> Results:
    """Train adapters, one job after the other; return what the worker wrote."""
    for name, job in jobs.items():
        job["out"] = str(tmp / f"{name}.json")
    file = tmp / f"{'-'.join(jobs)}.job"
    file.write_text(json.dumps(list(jobs.values())))
    torchrun(WORKER, file, ranks=ranks)
    return {name: json.loads(Path(job["out"]).read_text()) for name, job in jobs.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Run everything, with as few starts as there are numbers of processes."""
    tmp = tmp_path_factory.mktemp("lora")
    base, grouped = str(tmp / "a" / "step-00000000"), str(tmp / "b" / "step-00000000")
    plain = {"base": base, "fill": True}
    single = {
        "single": {"recipe": PLAIN, **plain},
        "parts": {"recipe": PARTS, "base": grouped, "fill": True},
        "whole": {"recipe": {**RESUMED, "training": {"train_steps": 4}}, **plain},
    }
    wide = {"base": str(tmp / "c" / "step-00000000"), "fill": True}
    single["qlora"] = {"recipe": QLORA, **wide}
    single["not-quantised"] = {"recipe": {**QLORA, "lora": QLORA["lora"] | {"quantize": None}}, **wide}
    found = run(tmp, 1, single)
    parallel: dict[int, dict[str, dict[str, Any]]] = {2: {}, 4: {}}
    for name, (ranks, layout) in LAYOUTS.items():
        parallel[ranks][name] = {"recipe": {**PLAIN, "parallel": layout}, **plain}
    parallel[4]["parts-parallel"] = {"recipe": {**PARTS, "parallel": TP2_PP2_SP}, "base": grouped, "fill": True}
    parallel[4]["first"] = {"recipe": {**HALF, "parallel": TP2_PP2_SP}, **plain, "save": str(tmp / "saved")}
    dropped = {**RESUMED, "lora": RESUMED["lora"] | {"dropout": 0.3}, "parallel": TP2}
    parallel[2]["dropped"] = {"recipe": dropped, **plain}
    parallel[4]["qlora-parallel"] = {"recipe": {**QLORA, "parallel": TP2_PP2_SP}, **wide}
    parallel[2]["qlora-tp2"] = {"recipe": {**QLORA, "parallel": TP2}, **wide}
    found |= run(tmp, 4, parallel[4])
    parallel[2]["second"] = {
        "recipe": {**HALF, "parallel": TP2},
        "base": base,
        "load": found["first"]["saved"],
        "first": 2,
    }
    found |= run(tmp, 2, parallel[2])
    return found


def same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got["loss"] == pytest.approx(expected["loss"], rel=FP32)
    assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=FP32)
    assert got["frozen_same"] and expected["frozen_same"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name: str, results: Results) -> None:
    same(results[name], results["single"])


def test_adapters_on_parts_of_layers(results: Results) -> None:
    same(results["parts-parallel"], results["parts"])


def test_resume_at_another_layout(results: Results) -> None:
    """Adapters and optimizer state of TP 2 x PP 2 + SP go on at TP 2."""
    halves = {key: [*results["first"][key], *results["second"][key]] for key in ("loss", "grad_norm")}
    same({**halves, "frozen_same": results["second"]["frozen_same"]}, results["whole"])


@pytest.mark.parametrize("name", ["qlora-parallel", "qlora-tp2"])
def test_quantised_weights_at_any_layout(name: str, results: Results) -> None:
    same(results[name], results["qlora"])
    assert results[name]["full_precision_kept"] == 0
    close, exact = results["qlora"]["loss"][0], results["not-quantised"]["loss"][0]
    assert 1e-6 < abs(close / exact - 1) < 0.05  # rounded, and no more than that


def test_dropout(results: Results) -> None:
    """It changes the losses, and tensor-parallel replicas of an adapter stay the same."""
    assert results["dropped"]["frozen_same"]
    assert results["dropped"]["loss"][0] != pytest.approx(results["whole"]["loss"][0], rel=1e-4)


def test_steps_learn(results: Results) -> None:
    assert len(set(results["single"]["loss"])) == 3
    assert all(norm > 0 for norm in results["single"]["grad_norm"])
