"""Every layer, preset and recipe is built from Transformer Engine's classes, without a GPU (``make test-te``).

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

load_presets()
# But codes, which have no layers of Transformer Engine's.
TOWERS = [name for name in registry.VISION.names() if registry.VISION.find(name).architecture.name != "vq_gan"]
BEHIND = [name for name in registry.CONNECTORS.names() if name != "codes"]
TOWER = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 128}
DECODER: dict[str, Any] = {"num_layers": 2, "hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 4}
DECODER |= {"num_query_groups": 2, "kv_channels": 64, "vocab_size": 512, "max_position_embeddings": 2048}

MAMBA = {"num_layers": 2, "hidden_size": 256, "intermediate_size": 512, "time_step_rank": 16, "vocab_size": 512}


def tower(name: str) -> dict[str, Any]:
    """Return the branch of a preset with two layers, else as large as it is."""
    sizes = {} if "hidden_size" in registry.VISION.find(name).values else {**TOWER, "positional_grid": 4}
    return {"vision": {**sizes, "preset": name, "num_layers": 2}}


def decoder(name: str, **values: Any) -> dict[str, Any]:
    """Return the branch of a preset made small."""
    if registry.LANGUAGE.find(name).architecture.name == "mamba":
        return {"language": {**MAMBA, "preset": name, **values}}
    if "kv_lora_rank" in registry.LANGUAGE.find(name).values:
        values = {"num_query_groups": 4, "rotary_percent": 0.5, "kv_lora_rank": 64, "v_head_dim": 48, **values}
    return {"language": {**DECODER, "preset": name, **values}}


def connector(name: str) -> dict[str, Any]:
    """Return the branch of a preset."""
    preset = name.replace("<N>", "2")
    more = {"num_queries": 4, "head_dim": 16} if "num_queries" in registry.CONNECTORS.find(preset).values else {}
    return {"connector": {"preset": preset, **more}}


FP8 = {"fp8": "hybrid"}
ALL_FP8 = {**FP8, "vision_bf16": False, "connector_bf16": False}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    **{f"tower {name}": {"model": tower(name)} for name in TOWERS},
    **{f"tower {name} in FP8": {"model": tower(name), "engine": ALL_FP8} for name in TOWERS},
    **{f"language {name}": {"model": decoder(name)} for name in registry.LANGUAGE.names()},
    **{
        f"language {name} in FP8": {"model": decoder(name), "engine": FP8}
        for name in registry.LANGUAGE.names()
        if registry.LANGUAGE.find(name).architecture.products is not None
    },
    **{f"connector {name}": {"model": connector(name)} for name in BEHIND},
    **{f"connector {name} in FP8": {"model": connector(name), "engine": ALL_FP8} for name in BEHIND},
    **{
        f"recipe {name}": {"engine": {**ALL_FP8, "fp8_recipe": name}}
        for name in ("delayed", "tensorwise", "blockwise", "mxfp8")
    },
    "e4m3": {"engine": {"fp8": "e4m3"}},
    "first and last in BF16": {"engine": {**FP8, "first_last_layers_bf16": True}},
    "tied embeddings": {"model": decoder("qwen3", tie_word_embeddings=True)},
    "adapters": {"lora": {"rank": 4}},
    "adapters, embedding and head": {"lora": {"rank": 4, "train_embeddings": True, "train_head": True}},
    "heads of 128": {"model": decoder("llama", kv_channels=128)},
    "heads of 192": {"model": decoder("llama", kv_channels=192)},
    "heads of 192 in FP8": {"model": decoder("llama", kv_channels=192), "engine": FP8},
    "recompute": {"parallel": {"recompute_granularity": "full"}, "engine": FP8},
    "graphs": {"engine": {"cuda_graph_impl": "transformer_engine"}},
    "its loss": {"engine": {"cross_entropy_fusion_impl": "te"}},
}
ENGINE_LINEARS = {
    "linear_qkv": "TELayerNormColumnParallelLinear",
    "linear_fc1": "TELayerNormColumnParallelLinear",
    "linear_proj": "TERowParallelLinear",
    "linear_fc2": "TERowParallelLinear",
}


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    """What the process says of each case."""
    worker = ROOT / "tests" / "parallel" / "te_worker.py"
    path = [str(ROOT), str(ROOT / "tests"), *filter(None, sys.path)]
    env = {**os.environ, "PYTHONPATH": ":".join(path), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, str(worker), json.dumps(CASES)], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def of(parts: dict[str, str], name: str) -> set[str]:
    """Return the classes of all parts of one name."""
    return {kind for path, kind in parts.items() if path.rpartition(".")[2] == name}


@pytest.mark.parametrize("name", CASES)
def test_it_is_built_of_transformer_engine(name: str, built: dict[str, Any]) -> None:
    got, engine = built[name], CASES[name].get("engine", {})
    assert "error" not in got, got["error"]
    assert not got["differs"], "a checkpoint of Transformer Engine's layers is not one of torch's"
    assert got["tensors"] > 20
    fp8 = engine.get("fp8", "")
    for part, low in (("language", True), ("vision", not engine.get("vision_bf16", True))):
        wide = part == "language" and "192" in name
        attention = "TorchAttention" if wide else "TEDotProductAttention"
        format_ = fp8 if low else ""
        assert of(got[part], "core_attention") == {f"{attention} {format_}".strip()}
        if not (part == "language" and "lora" in CASES[name]):
            linears = {linear: f"{kind} {format_}".strip() for linear, kind in ENGINE_LINEARS.items()}
            assert {linear: of(got[part], linear) for linear in linears} == {k: {v} for k, v in linears.items()}
    assert of(got["language"], "final_layernorm") == {"RMSNorm"}


def test_adapters_have_their_own_linears_beside_its_norm_and_attention(built: dict[str, Any]) -> None:
    parts = built["adapters"]["language"]
    assert of(parts, "linear_qkv") == of(parts, "linear_fc1") == {"ColumnParallelLinear"}
    assert of(parts, "linear_proj") == of(parts, "linear_fc2") == {"RowParallelLinear"}


def test_heads_have_norms_where_the_preset_says_so(built: dict[str, Any]) -> None:
    assert of(built["language qwen3"]["language"], "q_layernorm") == {"RMSNorm"}
    assert of(built["language qwen2"]["language"], "q_layernorm") == {"IdentityOp"}


@pytest.mark.parametrize("name", BEHIND)
def test_a_connector_is_transformer_engines_in_fp8_only(name: str, built: dict[str, Any]) -> None:
    high, low = (built[f"connector {name}{how}"]["connector"] for how in ("", " in FP8"))
    linears = [path for path, kind in high.items() if "ParallelLinear" in kind]
    assert linears and linears == [path for path, kind in low.items() if "ParallelLinear" in kind]
    assert all(high[path].endswith("ParallelLinear") and not high[path].startswith("TE") for path in linears), high
    assert all(low[path].startswith("TE") and low[path].endswith(" hybrid") for path in linears), low
