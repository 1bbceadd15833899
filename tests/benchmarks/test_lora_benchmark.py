"""Qwen-VL's table of LoRA and Q-LoRA: the recipes are the shipped ones at full size; the script runs in small."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from megavlm.config.checks import check_recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def lora(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("lora")


def test_one_gpu_with_the_authors_batch(lora: ModuleType) -> None:
    for kind in lora.QWEN_VL:
        recipe = lora.qwen_vl_recipe(kind, 1024, tiny=False)
        check_recipe(recipe, 1)
        assert (recipe.training.global_batch_size, recipe.data.sequence_length) == (8, 1024)
        assert recipe.lora.train_head == (kind == "LoRA (base)") and recipe.model.language.num_layers == 32
        assert (recipe.lora.quantize is not None) == (kind == "Q-LoRA")


def test_a_small_run(lora: ModuleType) -> None:
    rows = lora.measure_qwen_vl("Q-LoRA", [48, 64], 1, tiny=True)
    assert [row["tokens"] for row in rows] == [48, 64] and all(row["seconds"] > 0 for row in rows)
    assert all(0 < row["loss"] < 20 for row in rows)
    table = lora.qwen_vl_table([{**rows[0], "tokens": 384, "allocated": 17_500_000_000}])
    assert table.splitlines()[-1].startswith("| Q-LoRA | 384 | 17.5 | - | ") and table.endswith(" | 17.0 | 4.2 |")
