"""A tiny Qwen-VL directory, quick to make and to convert, and what tests of broken input do with it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import qwen_reference
import torch
from qwen_reference import Sizes, State
from safetensors.torch import load_file, save_file

from megavlm.cli import main

SMALL = Sizes(
    vocab=120, hidden=128, layers=2, heads=4, ffn=88, image=28, patch=7, width=40, vision_layers=2, vision_heads=5,
    vision_ffn=56, queries=9, rows=256, image_token=117,
)  # fmt: skip


def sizes(**changes: int) -> Sizes:
    """Return SMALL with changes, such as a vocabulary that makes for a large file."""
    return dataclasses.replace(SMALL, **changes)


def config(s: Sizes = SMALL) -> dict[str, Any]:
    """Return the config.json of a Qwen-VL."""
    return {
        "model_type": "qwen", "vocab_size": s.vocab, "hidden_size": s.hidden, "intermediate_size": 2 * s.ffn,
        "num_hidden_layers": s.layers, "num_attention_heads": s.heads, "kv_channels": s.hidden // s.heads,
        "max_position_embeddings": 8192, "rotary_emb_base": 10000, "layer_norm_epsilon": 1e-6, "no_bias": True,
        "tie_word_embeddings": False,
        "visual": {
            "heads": s.vision_heads, "image_size": s.image, "image_start_id": s.image_token - 2,
            "layers": s.vision_layers, "mlp_ratio": s.vision_ffn / s.width, "output_dim": s.hidden,
            "patch_size": s.patch, "width": s.width, "n_queries": s.queries,
        },
    }  # fmt: skip


def state(s: Sizes = SMALL, dtype: torch.dtype = torch.float32) -> State:
    """Return random weights."""
    return {name: value.to(dtype) for name, value in qwen_reference.random_state(s, 7).items()}


def write(directory: Path, tensors: Mapping[str, torch.Tensor] | None = None, s: Sizes = SMALL) -> Path:
    """Write a directory with one file of safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = state(s) if tensors is None else tensors
    save_file({name: value.contiguous() for name, value in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config(s)))
    return directory


def write_sharded(directory: Path, tensors: Mapping[str, torch.Tensor] | None = None, s: Sizes = SMALL) -> Path:
    """Write a directory with two shards and an index."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = state(s) if tensors is None else tensors
    weight_map = {}
    for shard in (1, 2):
        file = f"model-{shard:05d}-of-00002.safetensors"
        own = {name: value.contiguous() for i, (name, value) in enumerate(tensors.items()) if i % 2 == shard - 1}
        save_file(own, directory / file)
        weight_map |= dict.fromkeys(own, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config(s)))
    return directory


def digest(directory: Path) -> dict[str, str]:
    """Return the digest of every file below ``directory``, and its folders."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(directory.rglob("*"))
    }


class Canary:
    """An object whose unpickling touches a file: what a malicious checkpoint would do, and worse."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def megatron(source: Path, out: Path) -> Path:
    """Convert ``source`` to a Megatron checkpoint."""
    assert main(["convert", "hf-to-megatron", "--hf", str(source), "--out", str(out)]) == 0
    return out


def load_state(directory: Path) -> State:
    """Return all tensors of a directory."""
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


def equal(a: State, b: State) -> bool:
    """Whether two states are the same, bit for bit."""
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)
