"""Tensor parallelism above the number of key/value heads trains, saves, converts and answers as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from family_cases import clip_vision, made
from safetensors.torch import load_file
from test_peft import adapted, convert
from test_reshard import tensors
from tiny import tiny_recipe
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from megavlm.checkpoint.slots import Slot
from megavlm.checkpoint.stream import CheckpointReader
from megavlm.planning.layout import layout_of
from megavlm.planning.parameters import chunk_parameters

pytestmark = pytest.mark.long

FP32 = 1e-5
TP2, TP4, PP2 = (
    {"tensor_model_parallel_size": 2},
    {"tensor_model_parallel_size": 4},
    {"pipeline_model_parallel_size": 2},
)
SP = {"sequence_parallel": True}
PLAIN = {"use_distributed_optimizer": False}  # whole gradients on every replica


def model(preset: str, groups: int, **language: Any) -> dict[str, Any]:
    """Return a small model of 8 query heads and ``groups`` key/value heads."""
    return {
        "preset": "tiny",
        "vision": {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_layers": 2, "ffn_hidden_size": 96}
        | {"num_attention_heads": 4, "positional_grid": 2},
        "connector": {"num_queries": 4, "head_dim": 16},
        "language": {"preset": preset, "hidden_size": 64, "ffn_hidden_size": 96, "num_layers": 4, "vocab_size": 517}
        | {"num_attention_heads": 8, "num_query_groups": groups, "kv_channels": 16, "max_position_embeddings": 2048}
        | {"init_method_std": 0.2, **language},
    }


FREEZE = {"modules": {"vision": {"freeze": True}}}
SOME = {"lora": {"rank": 4, "alpha": 16.0, "targets": ["v_proj", "q_proj", "up_proj"]}, **FREEZE}
KEYS = {"lora": {"rank": 4, "alpha": 16.0, "targets": ["k_proj"]}, **FREEZE}
ALL = {"lora": {"rank": 4, "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]}, **FREEZE}
FUSED = {"lora": {"rank": 4, "targets": ["c_attn", "attn.c_proj"]}, **FREEZE}
# Shards of whole groups of 64 x 256 weights at TP 4.
WIDE = {"hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 4, "kv_channels": 64, "num_layers": 2}
WIDE |= {"init_method_std": 0.1}
NF4 = {"lora": {**SOME["lora"], "quantize": "nf4"}, **FREEZE}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-1": {"model": model("qwen3", 1)},  # norms on queries and keys
    "qwen3-2": {"model": model("qwen3", 2, tie_word_embeddings=True)},
    "qwen2-1": {"model": model("qwen2", 1)},  # biases
    "qwen2-2": {"model": model("qwen2", 2)},
    "lora-some": {"model": model("qwen3", 2), **SOME},
    "lora-some-1": {"model": model("qwen2", 1), **SOME},
    "lora-keys": {"model": model("qwen2", 1), **KEYS},
    "lora-all": {"model": model("qwen2", 1), **ALL},
    "lora-fused": {"model": model("qwen2", 2, layer_names="qwen"), **FUSED},
    "qlora": {"model": model("qwen2", 2, **WIDE), **NF4},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-1 at TP 4 + SP": ("qwen3-1", TP4 | SP),
    "qwen3-1 at TP 2 x PP 2": ("qwen3-1", TP2 | PP2),
    "qwen3-2 at TP 4": ("qwen3-2", TP4),
    "qwen2-1 at TP 2 x PP 2 + SP": ("qwen2-1", TP2 | PP2 | SP),
    "qwen2-1 at TP 2 x DP 2, selective": ("qwen2-1", TP2 | {"recompute_granularity": "selective"}),
    "qwen2-1 at TP 2 x PP 2 x VPP 2": ("qwen2-1", TP2 | PP2 | {"virtual_pipeline_model_parallel_size": 2}),
    "qwen2-2 at TP 4 + SP, full": ("qwen2-2", TP4 | SP | {"recompute_granularity": "full"}),
    "some adapters at TP 4 + SP": ("lora-some", TP4 | SP),
    "some adapters at TP 4, one head": ("lora-some-1", TP4),
    "adapters of keys at TP 4, full": ("lora-keys", TP4 | {"recompute_granularity": "full"}),
    "all adapters at TP 4": ("lora-all", TP4),
    "all adapters at TP 2 x PP 2 + SP": ("lora-all", TP2 | PP2 | SP),
    "fused adapters at TP 4 + SP": ("lora-fused", TP4 | SP),
    "4 bits at TP 4 + SP": ("qlora", TP4 | SP),
}
IMAGE = 119
TEXT: dict[str, Any] = {
    "vocab_size": 120, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 1, "max_position_embeddings": 256, "initializer_range": 0.1,
}  # fmt: skip
AT_TP4 = ["parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true"]


def branches(name: str, parallel: dict[str, Any]) -> dict[str, Any]:
    return {**MODELS[name], "parallel": {**PLAIN, **parallel}, "training": {"global_batch_size": 2}}


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything of this module lies here."""
    return tmp_path_factory.mktemp("kv-heads")


@pytest.fixture(scope="module")
def results(tmp: Path) -> dict[str, list[Any]]:
    """Run everything in two starts; return by job what each rank gave."""
    single: dict[str, Any] = {}
    for name in MODELS:
        single[name] = {"kind": "train", "recipe": branches(name, {}), "weights": _weights(tmp, name)}
        single[name] |= {"gradients": str(tmp / "gradients" / name)}
    single["answers"] = {"kind": "answer", "recipe": MODELS["qwen3-2"], "weights": _weights(tmp, "qwen3-2")}
    found = _run(single, 1)
    several: dict[str, Any] = {}
    for case, (name, parallel) in CASES.items():
        several[case] = {"kind": "train", "recipe": branches(name, parallel), "weights": _weights(tmp, name)}
        several[case] |= {"gradients": str(tmp / "gradients" / case)}
    previous: dict[str, Any] = {"steps": 2}
    for number, parallel in enumerate((TP4, TP2 | PP2 | SP, TP4 | SP)):
        recipe = {**MODELS["qwen3-1"], "parallel": parallel}
        job = {"kind": "train", "recipe": recipe, "weights": _weights(tmp, "qwen3-1"), "save": str(tmp / f"{number}")}
        several[f"moved {number}"] = {**job, **previous}
        previous = {"load": str(tmp / f"{number}" / "step-00000003"), "steps": 0}
    several["answers at TP 4"] = single["answers"] | {"recipe": MODELS["qwen3-2"] | {"parallel": TP4}}
    several["answers at TP 4 + SP"] = single["answers"] | {"recipe": MODELS["qwen3-2"] | {"parallel": TP4 | SP}}
    base, adapters = _published(tmp)
    again = {"kind": "save_again", "words": AT_TP4, "image_token": IMAGE}
    several["published"] = {**again, "load": str(base), "save": str(tmp / "published")}
    several["adapters"] = {**again, "load": str(adapters), "base": str(base), "save": str(tmp / "adapters")}
    found |= _run(several, 4)
    one = {**previous, "kind": "train", "recipe": MODELS["qwen3-1"], "weights": _weights(tmp, "qwen3-1")}
    return found | _run({"moved 3": {**one, "save": str(tmp / "3")}}, 1)


def _weights(tmp: Path, name: str) -> str:
    return str(tmp / "weights" / name / "step-00000000")


def _run(jobs: dict[str, Any], world: int) -> dict[str, list[Any]]:
    by_rank = ranks.run("kv_heads_cases:run_jobs", list(jobs.values()), world=world)
    return {name: list(given) for name, given in zip(jobs, zip(*by_rank, strict=True), strict=True)}


def _published(tmp: Path) -> tuple[Path, Path]:
    """Return a model around a converted decoder of one key/value head, and adapters for some of its layers."""
    made(Qwen3ForCausalLM, Qwen3Config(**TEXT)).to(torch.bfloat16).save_pretrained(tmp / "hf")
    clip_vision().save_pretrained(tmp / "clip")
    recipe = tmp / "recipe.yaml"
    recipe.write_text(
        "output_dir: unused\nmodel: {preset: tiny, connector: {num_queries: 4, head_dim: 16}}\n"
        "data: {train: [{path: unused}], sequence_length: 512, tokenizer: unused}\noptimizer: {lr: 1e-3}\n"
        "training: {train_steps: 2, global_batch_size: 4}\n"
    )
    parts = ["--language", tmp / "hf", "--vision", tmp / "clip", "--recipe", recipe]
    convert("hf-to-megatron", *parts, "--out", tmp / "base")
    return tmp / "base", adapted(tmp / "base", tmp / "one-process", ["q_proj", "v_proj"], [])


def gradients(root: Path) -> dict[str, Tensor]:
    """Return the whole gradients, without those of rows that pad the vocabulary."""
    reader, found = CheckpointReader(root / "step-00000000"), {}
    for key, entry in reader.tensors().items():
        whole = reader.read(Slot(key, tuple(entry.size)))
        found[key] = whole[:517] if "word_embeddings" in key or "output_layer" in key else whole
    return found


@pytest.mark.parametrize("case", CASES)
def test_training_equals_one_process(case: str, results: dict[str, list[Any]], tmp: Path) -> None:
    name = CASES[case][0]
    (expected,) = results[name]
    for got in results[case]:
        assert got["loss"] == pytest.approx(expected["loss"], rel=FP32)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=FP32)
    whole, parts = gradients(tmp / "gradients" / name), gradients(tmp / "gradients" / case)
    assert whole.keys() == parts.keys()
    assert any("lora_b" in key for key in whole) == ("lora" in MODELS[name])
    largest = max(float(values.abs().max()) for values in whole.values())
    for key, values in whole.items():
        size = float(values.abs().max())
        if key == "connector.linear_k.bias":  # zero but for rounding: a bias on all keys changes no softmax
            assert max(size, float(parts[key].abs().max())) < FP32 * largest
            continue
        torch.testing.assert_close(parts[key], values, rtol=0, atol=FP32 * size, msg=lambda m, key=key: f"{key}: {m}")
        if "lora" not in MODELS[name] and ("linear_qkv" in key or "k_layernorm" in key):
            assert size > 1e-3 * largest, key  # else little would be compared


@pytest.mark.parametrize("case", CASES)
def test_the_planner_counts_the_parameters_of_each_rank(case: str, results: dict[str, list[Any]]) -> None:
    name, parallel = CASES[case]
    recipe = tiny_recipe(**branches(name, parallel))
    layout = layout_of(recipe, 4)
    for got in results[case]:
        counted = [p for chunk in layout.chunks_of(got["stage"]) for p in chunk_parameters(recipe, layout, chunk)]
        assert sum(p.elements for p in counted if p.learns) == got["learning"]
        assert sum(p.elements for p in counted if not p.quantised) == got["parameters"]


def test_a_change_of_layout_changes_no_bit(results: dict[str, list[Any]], tmp: Path) -> None:
    """From TP 4 to TP 2 x PP 2, back, and to one process, with the optimizer's state."""
    assert {"moved 0", "moved 1", "moved 2", "moved 3"} <= results.keys()
    saved = tensors(tmp / "0")
    for number in (1, 2, 3):
        assert tensors(tmp / str(number)) == saved, number


@pytest.mark.parametrize("layout", ["TP 4", "TP 4 + SP"])
def test_answers_are_those_of_one_process(layout: str, results: dict[str, list[Any]]) -> None:
    (expected,) = results["answers"]
    assert len({tuple(one) for one in expected[0]}) > 4  # else the test would show little
    assert all(got == expected for got in results[f"answers at {layout}"])


def test_published_weights_come_home_bit_for_bit(results: dict[str, list[Any]], tmp: Path) -> None:
    saved = results["published"][0]
    convert("megatron-to-hf", "--megatron", saved, "--family", "llama", "--out", tmp / "home")
    before, after = (load_file(tmp / name / "model.safetensors") for name in ("hf", "home"))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_adapters_come_out_as_from_one_process(results: dict[str, list[Any]], tmp: Path) -> None:
    saved = Path(results["adapters"][0])
    one = next((tmp / "one-process").glob("step-*"))
    for name, checkpoint in {"peft-one": one, "peft-four": saved}.items():
        convert("megatron-to-hf", "--megatron", checkpoint, "--adapter", "--family", "llama", "--out", tmp / name)
    before, after = (load_file(tmp / name / "adapter_model.safetensors") for name in ("peft-one", "peft-four"))
    assert any(".lora_B." in key and float(value.abs().max()) > 0 for key, value in before.items())
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
