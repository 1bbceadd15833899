"""Generation: packed answers equal plain greedy decoding, at every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generate_prompts import VOCABULARY, prompts
from ranks import script
from tiny import IMAGE_TOKEN, SEQUENCE_LENGTH, tiny_recipe

from megavlm.inference.generate import generate
from megavlm.inference.packs import first_fit
from megavlm.inference.prompt import Prompt
from megavlm.models.build import build_model
from megavlm.parallel.state import process_groups

WORKER = Path(__file__).with_name("generate_worker.py")

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2-pp2-sp": (
        4,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "pp2-vpp2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
}


def run(
    tmp: Path, name: str, ranks: int, parallel: dict[str, Any], weights: Path, **language: Any
) -> dict[str, list[list[int]]]:
    """Answer the prompts."""
    job, out = tmp / f"{name}.job.json", tmp / f"{name}.json"
    job.write_text(json.dumps({"parallel": parallel, "weights": str(weights), "out": str(out), "language": language}))
    script(WORKER, job, world=ranks)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[list[int]]]]:
    """Return the weights and the answers of one process."""
    tmp = tmp_path_factory.mktemp("single")
    weights = tmp / "step-00000000"
    return weights, run(tmp, "single", 1, {}, weights)


def test_packed_answers_equal_plain_decoding(single: tuple[Path, dict[str, list[list[int]]]]) -> None:
    answers = single[1]["answers"]
    assert answers == single[1]["naive"]
    assert len({tuple(answer) for answer in answers}) > 4  # else the test would show little
    assert max(map(len, answers)) == 6
    assert single[1]["small_cache"] == answers
    assert single[1]["sampled"] != answers


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_agree(name: str, single: tuple[Path, dict[str, list[list[int]]]], tmp_path: Path) -> None:
    ranks, parallel = LAYOUTS[name]
    result = run(tmp_path, name, ranks, parallel, single[0])
    for kind in ("answers", "small_cache", "sampled"):
        assert result[kind] == single[1][kind]


EXPERTS: dict[str, Any] = {"num_moe_experts": 8, "moe_ffn_hidden_size": 48, "moe_layer_freq": 2}
SHARED: dict[str, tuple[int, dict[str, Any]]] = {
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "pp2-ep2": (4, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    "tp2-ep4": (
        4,
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 4, "sequence_parallel": True},
    ),
    "ep2-cut": (4, {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}),
}
"""Ranks of two or more replicas share out the experts."""


@pytest.mark.long
def test_replicas_that_share_experts_answer_as_one(tmp_path: Path) -> None:
    weights = tmp_path / "one" / "step-00000000"
    alone = run(tmp_path, "alone", 1, {}, weights, **EXPERTS)
    assert alone["answers"] == alone["naive"] and len({tuple(answer) for answer in alone["answers"]}) > 4
    for name, (ranks, parallel) in SHARED.items():
        result = run(tmp_path, name, ranks, parallel, weights, **EXPERTS)
        for kind in ("answers", "small_cache", "sampled"):
            assert result[kind] == alone[kind], f"{name}: {kind}"


def test_groups_hold_each_prompt_once_and_fit() -> None:
    lengths = [5, 9, 3, 7, 2, 10]
    groups = first_fit(lengths, 10)
    assert sorted(i for group in groups for i in group) == list(range(6))
    assert all(sum(lengths[i] for i in group) <= 10 for group in groups)
    assert len(groups) == 4
    assert first_fit([], 10) == []


def test_where_slots_are_token_0_packs_are_filled_with_another() -> None:
    """As CogVLM's are, whose slot is ``<unk>``: prompts of several lengths together, and each alone."""
    asked = [Prompt(np.where(one.tokens == IMAGE_TOKEN, 0, np.maximum(one.tokens, 1)), one.images) for one in prompts()]
    recipe = tiny_recipe()
    with process_groups(recipe.parallel, 1):
        chunks = build_model(recipe, 0)
        together, alone = (
            [
                answer
                for group in groups
                for answer in generate(
                    chunks, group, max_new_tokens=3, stop_ids=[VOCABULARY - 1], vocab_size=VOCABULARY,
                    pack_length=SEQUENCE_LENGTH,
                )
            ]
            for groups in ([asked], [[one] for one in asked])
        )  # fmt: skip
    assert together == alone and len(together) == 7
