"""The scripts that time a layer run in small, on the same numbers on both sides; sides take turns."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megavlm.config.schema import ParallelConfig
from megavlm.parallel.state import process_groups

ROOT = Path(__file__).resolve().parents[2]
Load = Callable[[str], ModuleType]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Import a script of benchmarks/."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_sides_take_turns(module: Load) -> None:
    turns, order = module("turns"), []
    calls = {name: lambda name=name: order.append(name) or {"seconds": len(order)} for name in "abc"}
    found = turns.in_turns("some", calls, 4)
    assert "".join(order) == "abcbcacababc"
    assert [one["seconds"] for one in found["b"]] == [2, 4, 9, 11]
    assert turns.median(found["b"]) == 6.5 and turns.quotient(found["b"], found["a"]) == (1.1 + 9 / 8) / 2


def test_layers_that_attend_to_pictures(module: Load) -> None:
    """Padding, tiles and heads that share keys; and the check sees a weight that is another."""
    script = module("cross_attention")
    sizes = script.Sizes(hidden=64, ffn=96, heads=4, groups=2, head=16, tile=3)
    with process_groups(ParallelConfig(), seed=1):
        found = script.measure(sizes, list(script.CASES), 2)
        both = script.sides(sizes)
        with torch.no_grad():
            both[script.OURS].layer.cross_attention.linear_kv.weight[0, 0] += 1
        texts, pictures = script.inputs(script.CASES["one tile"], sizes)
        works = {side: system.ready(texts, pictures) for side, system in both.items()}
        with pytest.raises(SystemExit, match="do not compute the same"):
            script.check_same(works, [*texts, *pictures], torch.ones(512, 64))
    assert {name: (one["tokens"], one["features"]) for name, one in found.items()} == {
        "no padding": (512, 12), "much text": (2048, 12), "one tile": (512, 3), "samples of all sizes": (2048, 33),
    }  # fmt: skip
    assert all(one["apart"] < 1e-4 for one in found.values())
    check_answers({name: one["sides"] for name, one in found.items()}, {script.OURS, script.THEIRS})
    lines = script.table(found).splitlines()
    assert sum(line.startswith("| no padding |") for line in lines) == 3 and lines[-1].startswith("- **samples of all")
    assert next(line for line in lines if line.endswith(" | 0.95x |")).startswith("| no padding |")


def test_a_visual_expert(module: Load) -> None:
    script = module("visual_expert")
    with process_groups(ParallelConfig(), seed=1):
        found = script.measure(64, 32, 2)
    assert list(found) == ["0%", "50%", "100%"]
    check_answers(found, {script.PLAIN, script.EXPERT})
    assert script.table(found).count("\n") == 4


def check_answers(found: dict[str, dict[str, list[dict[str, Any]]]], names: set[str]) -> None:
    for sides in found.values():
        assert sides.keys() == names
        assert all(one[key] > 0 for answers in sides.values() for one in answers for key in ("seconds", "cpu_seconds"))
        assert {len(answers) for answers in sides.values()} == {2}
