"""Every part, preset and recipe is built from Transformer Engine's classes, without a GPU (``make test-te``).

One process is told of an H100 and builds all models with their weights on the CPU; nothing is computed. What only a
device shows is ``gpu_check``'s: whether the kernels run, and whether they are right.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.machinery import PathFinder
from typing import Any

import pytest
import torch
from launch import ROOT

from megavlm.config import architecture as registry
from megavlm.families.presets import load_presets

# sys.modules says that it is not there: without a device the package is hidden from Megatron-Core.
HERE = PathFinder.find_spec("transformer_engine") is not None and torch.version.cuda is not None
pytestmark = [
    pytest.mark.te,
    pytest.mark.skipif(
        not HERE, reason="needs Transformer Engine and a CUDA build of torch: make test-te PYTHON=... TE_PIECES=folders"
    ),
]

FP8 = {"fp8": "hybrid"}
ALL_FP8 = {**FP8, "vision_bf16": False, "connector_bf16": False}


DECODER: dict[str, Any] = {"num_layers": 2, "hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 4}
DECODER |= {"num_query_groups": 2, "kv_channels": 64, "vocab_size": 512, "max_position_embeddings": 2048}


def language(preset: str = "llama", **values: Any) -> dict[str, Any]:
    """Return the model branch of a small decoder."""
    return {"language": {**DECODER, "preset": preset, **values}}


# Beside what the worker knows: every registered part alone and in FP8, all of every_part, the shipped recipes.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    **{
        f"FP8 {name}": {"engine": {**ALL_FP8, "fp8_recipe": name}}
        for name in ("delayed", "tensorwise", "blockwise", "mxfp8")
    },
    "e4m3": {"engine": {"fp8": "e4m3"}},
    "first and last in BF16": {"engine": {**FP8, "first_last_layers_bf16": True}},
    "tied embeddings": {"model": language("qwen3", tie_word_embeddings=True)},
    "adapters": {"lora": {"rank": 4}},
    "adapters, embedding and head": {"lora": {"rank": 4, "train_embeddings": True, "train_head": True}},
    "heads of 128": {"model": language(kv_channels=128)},
    "heads of 192": {"model": language(kv_channels=192)},
    "heads of 192 in FP8": {"model": language(kv_channels=192), "engine": FP8},
    "recompute": {"parallel": {"recompute_granularity": "full"}, "engine": FP8},
    "graphs": {"engine": {"cuda_graph_impl": "transformer_engine"}},
    "its loss": {"engine": {"cross_entropy_fusion_impl": "te"}},
    "encoder and decoder": {"model": {"language": {"preset": "tiny_t5"}, "connector": {"preset": "linear"}}},
    "pictures see both ways, in a window": {
        "model": language("gemma3_text", attention_mask="prefix", sliding_window=8, sliding_window_pattern=2)
    },
}
FUSED, COLUMN, ROW = "TELayerNormColumnParallelLinear", "TEColumnParallelLinear", "TERowParallelLinear"
PLAIN = {FUSED: "ColumnParallelLinear", COLUMN: "ColumnParallelLinear", ROW: "RowParallelLinear"}
ROWS = ("linear_proj", "linear_fc2", "x_proj", "out_proj")
NOT_ITS = {"sam": "RelativeAttention", "tiled_vit": "TilesAttention", "convnext": ""}
"""Towers of plain linear layers, and who attends there."""


def of_language(path: str, facts: dict[str, Any]) -> str:
    """Return the class that a part of a language model is to have, by what its recipe says."""
    said, row = facts["language"], path.removesuffix(".vision").endswith(ROWS)
    core = path.endswith("core_attention")
    if facts["architecture"] != "decoder":
        return "DistanceAttention" if core else PLAIN[ROW if row else COLUMN]
    layer = int(path.split(".")[2]) if path.startswith("decoder.layers.") else None
    crossing = ".cross_attention." in path or layer in said["cross_attention_layers"]
    if core:
        every, window = said["sliding_window_pattern"], said["sliding_window"] is not None
        windowed = window and layer is not None and (every is None or (layer + 1) % every != 0)
        if not crossing and said["attention_mask"] != "causal":
            return "TwoWayAttention"
        return "TorchAttention" if crossing or windowed or said["kv_channels"] > 128 else "TEDotProductAttention"
    if layer is None or crossing or said["visual_expert"] or facts["lora"]:
        return PLAIN[ROW if row else COLUMN]
    alone = ".experts." in path or ".shared_experts." in path
    alone = alone or said["use_parallel_residual"] or not said["pre_layernorms"] or said["kv_lora_rank"] is not None
    return ROW if row else COLUMN if alone else FUSED


def of_tower(path: str, facts: dict[str, Any]) -> str:
    """Return the class that a part of a tower, or of one of two, is to have."""
    side, _, rest = path.partition(".")
    kind = facts["tower"]
    if side in ("low", "high"):
        kind, path = kind.split("_")[side == "high"], rest
    behind = facts["behind"]["high_" if side == "high" else ""]
    if path.endswith("core_attention"):
        return NOT_ITS.get(kind, "TEDotProductAttention")
    linear = ROW if path.endswith(ROWS) else COLUMN if behind or kind in NOT_ITS else FUSED
    its = facts["vision_fp8"] if kind == "convnext" else kind not in NOT_ITS and not behind
    return linear if its else PLAIN[linear]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the process says of each case."""
    worker, out = ROOT / "tests" / "parallel" / "te_worker.py", tmp_path_factory.mktemp("te") / "built.json"
    path = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "training"), *filter(None, sys.path)]
    env = {**os.environ, "PYTHONPATH": ":".join(path), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, str(worker), json.dumps(CASES), str(out)], env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(out.read_text())


def of(parts: dict[str, str], name: str) -> set[str]:
    """Return the classes of all parts of one name."""
    return {kind for path, kind in parts.items() if path.rpartition(".")[2] == name}


def wrong(case: dict[str, Any]) -> list[str]:
    """Return what is not as it should be of a case."""
    if "error" in case:
        return [case["error"]]
    facts, found = case["facts"], []
    if case["differs"]:
        found.append(f"a checkpoint of Transformer Engine's layers is not one of torch's: {case['differs'][:4]}")
    for part, expected, format_ in (
        ("language", of_language, facts["fp8"]), ("vision", of_tower, facts["vision_fp8"]),
    ):  # fmt: skip
        for path, kind in case[part].items():
            own, _, has = kind.partition(" ")
            if path.endswith("core_attention") or own.endswith("ParallelLinear"):
                if facts["lora"] and "experts." in path:  # plain where experts have adapters, else its own
                    continue
                want = expected(path, facts)
                if (own, has) != (want, format_):
                    found.append(f"{part} {path}: {kind}, not {want} {format_}")
    for path, kind in case["connector"].items():
        its = kind.startswith("TE")
        if "ParallelLinear" in kind and (its, kind.partition(" ")[2]) != (
            bool(facts["connector_fp8"]), facts["connector_fp8"]
        ):  # fmt: skip
            found.append(f"connector {path}: {kind} in {facts['connector_fp8'] or 'bf16'}")
    if facts["architecture"] != "encoder_decoder" and not of(case["language"], "final_layernorm") <= {
        "RMSNorm", "LayerNorm"
    }:  # fmt: skip
        found.append(f"final norm: {of(case['language'], 'final_layernorm')}")
    return found


def test_all_is_built_of_transformer_engine_as_its_kind_says(built: dict[str, Any]) -> None:
    """In one test: which cases there are the worker alone knows."""
    told = [f"{name}: {line}" for name, case in built.items() for line in wrong(case)[:3]]
    assert not told, "\n".join(told)
    assert len(built) > 500 and all(case["tensors"] > 15 for case in built.values())


def test_every_registered_part_and_every_kind_of_layer_is_among_them(built: dict[str, Any]) -> None:
    load_presets()
    kinds = {"vision": registry.VISION, "connector": registry.CONNECTORS, "language": registry.LANGUAGE}
    architectures = {kind: set() for kind in kinds}
    for case in built.values():
        for kind, own in kinds.items() if "facts" in case else ():
            architectures[kind].add(own.find(case["facts"]["presets"][kind]).architecture.name)
    for kind, own in kinds.items():
        every = {own.find(name.replace("<N>", "2")).architecture.name for name in own.names()}
        assert architectures[kind] == every
    classes = {kind.partition(" ")[0] for case in built.values() for kind in case["language"].values()}
    assert classes >= {FUSED, COLUMN, ROW, "TwoWayAttention", "TorchAttention", "TEDotProductAttention"}


def test_heads_have_norms_where_the_preset_says_so(built: dict[str, Any]) -> None:
    assert of(built["language: qwen3"]["language"], "q_layernorm") == {"RMSNorm"}
    assert of(built["language: qwen2"]["language"], "q_layernorm") <= {"IdentityOp"}
