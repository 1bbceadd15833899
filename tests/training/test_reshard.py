"""Weights and optimizer state survive every change of layout bit for bit."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import ROOT
from ranks import script

from megavlm.checkpoint.slots import Slot
from megavlm.checkpoint.stream import CheckpointReader

pytestmark = pytest.mark.reliability

WORKER = ROOT / "tests" / "training" / "reshard_worker.py"
TP, PP, VPP = (
    {"tensor_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2},
    {"virtual_pipeline_model_parallel_size": 2},
)
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
# Where it was saved, and where it is loaded and saved again.
CHANGES: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "dp2-to-dp1": [(2, OVERLAP), (1, {})],
    "dp1-to-dp2": [(1, {}), (2, OVERLAP)],
    "tp2-pp2-to-dp2": [(4, {**TP, **PP, "sequence_parallel": True}), (2, {})],
    "pp2-vpp2-to-tp2": [(2, {**PP, **VPP}), (2, TP)],
    "tp2-to-pp2-uneven": [(2, TP), (2, {**PP, "num_layers_in_first_pipeline_stage": 1})],
}
# Widths that fill no bucket evenly, and an embedding that is padded differently at each TP.
MODEL = {
    "preset": "tiny",
    "vision": {"image_size": 32, "hidden_size": 40, "num_layers": 2, "ffn_hidden_size": 72, "num_attention_heads": 4}
    | {"positional_grid": 2},
    "connector": {"num_queries": 4, "head_dim": 12},
    "language": {"hidden_size": 72, "ffn_hidden_size": 104, "num_attention_heads": 4, "num_query_groups": 4}
    | {"kv_channels": 18, "vocab_size": 509, "vocab_divisor": 8},
}


def tensors(root: Path) -> dict[str, str]:
    reader = CheckpointReader(root / "step-00000003")
    found = {}
    for key, entry in reader.tensors().items():
        rows = tuple(entry.size)
        if "word_embeddings" in key or "output_layer" in key:  # without the rows that pad the vocabulary
            whole = reader.read(Slot(key, rows))[:509]
        else:
            whole = reader.read(Slot(key, rows))
        found[key] = sha256(whole.flatten().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    assert any(key.startswith("optimizer.") for key in found)
    return found


@pytest.mark.dist
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_layout_changes_no_bit(name: str, tmp_path: Path) -> None:
    previous = None
    for i, (ranks, layout) in enumerate(CHANGES[name]):
        job = {"recipe": {"model": MODEL, "parallel": layout}, "load": previous, "save": str(tmp_path / str(i))}
        (tmp_path / "job.json").write_text(json.dumps(job))
        script(WORKER, str(tmp_path / "job.json"), world=ranks)
        previous = str(tmp_path / str(i) / "step-00000003")
    assert tensors(tmp_path / "0") == tensors(tmp_path / "1")
