"""An encoder and a decoder learn what Transformers' T5 does, at one process and cut over two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
from t5_cases import compare_all, write_reference
from t5_models import make

from megavlm.config.errors import UserError
from megavlm.families.t5 import t5_language

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


def test_an_output_layer_of_its_own_is_known_also_as_transformers_5_writes_it() -> None:
    """It writes that T5 1.1's is tied, and that it is not under another name."""
    config = make("gated-gelu").config.to_dict()
    assert config["tie_word_embeddings"] and not config["scale_decoder_outputs"]
    assert t5_language(config, "config.json")["hidden_size"] == config["d_model"]
    with pytest.raises(UserError, match="tie_word_embeddings is True; only false is supported"):
        t5_language({**config, "scale_decoder_outputs": True}, "config.json")
