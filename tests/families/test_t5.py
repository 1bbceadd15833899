"""An encoder and a decoder learn what Transformers' T5 does, at one process and cut over two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
from t5_cases import compare_all, write_reference

Written = tuple[Path, dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("t5")
    gates = ("gated-gelu", "gated-silu")
    return folder, {gate: write_reference(folder / gate, folder / f"{gate}.safetensors", gate) for gate in gates}


@pytest.mark.parametrize("recompute", [None, "full", "selective"])
def test_at_one_process(recompute: str | None, written: Written) -> None:
    """Loss, logits, all gradients and a picture's, of packs; layers that are computed again too."""
    folder, branches = written
    assert all(len(one) == 54 for one in compare_all(branches, str(folder), {"recompute_granularity": recompute}))


def test_at_tp2_with_sequence_parallelism(written: Written) -> None:
    folder, branches = written
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    for found in ranks.run("t5_cases:compare_all", branches, str(folder), layout, world=2):
        assert all(len(one) == 54 for one in found)
