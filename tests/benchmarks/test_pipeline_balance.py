"""The pipeline benchmark runs, in small: its shares hold, and balanced and ordered packs wait less."""

from __future__ import annotations

import importlib
import json
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def balance(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("pipeline_balance")


def test_the_mixes_are_as_described(balance: ModuleType) -> None:
    for name in balance.FULL_SCALE_DESCRIPTIONS:
        samples = np.array(list(islice(balance.shapes(name, seed=1), 2000)))
        assert samples[:, 0].max() <= 2048 and (samples[:, 0] >= 258 * samples[:, 1] + 8).all()
    text = np.mean([images == 0 for _, images in islice(balance.shapes("llava-like", seed=1), 4000)])
    assert abs(text - 0.06) < 0.015
    first, again = (list(islice(balance.shapes("multi-image", seed=3), 50)) for _ in range(2))
    assert first == again


def test_a_small_run(
    balance: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = balance.Case("qwen_vl_7b", 4, 2, 4, 8, ("multi-image",))
    monkeypatch.setattr(balance, "CASES", {"small": case})
    native = balance.native_balance
    monkeypatch.setattr(
        native, "CASES", {"odd": native.Case("qwen2_vl_7b", 4, 2, 2, 8, "native", max_pixels=4096 * 784)}
    )
    monkeypatch.setattr("sys.argv", ["benchmarks/pipeline_balance.py", "--steps=6", f"--out={tmp_path / 'out.json'}"])
    assert balance.main() == 0
    printed, result = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert "| **small**: TP 4 x PP 2 x DP 4, 8 micro-batches |" in printed and "| multi-image | " in printed
    (measured,) = result["cases"]
    # The tower learns, and takes as long as most of the language model: the first stage has few of its layers.
    assert measured["first"] < 16
    length, both = measured["rows"]["length"], measured["rows"]["both"]
    assert all(row["padding"] <= 0.01 and 0 < row["bubble"] < 1 for row in measured["rows"].values())
    assert both["stage_spread"] < 0.8 * length["stage_spread"] and both["images_spread"] < length["images_spread"]
    assert both["bubble"] < length["bubble"] - 0.01
    assert measured["rows"]["ordered"]["bubble"] <= length["bubble"]
    assert both["bubble"] <= measured["rows"]["balanced"]["bubble"]
    (odd,) = result["native"]
    counted, weighed = odd["rows"]["counted"], odd["rows"]["weighed"]
    assert "| odd: TP 4 x PP 2 x DP 2, 8 micro-batches | native | " in printed
    assert weighed["stage_spread"] < 0.9 * counted["stage_spread"] and weighed["bubble"] < counted["bubble"] - 0.005
    assert weighed["padding"] < 0.002


def test_films_are_grids_of_frames(balance: ModuleType) -> None:
    native = balance.native_balance
    case = native.Case("qwen2_5_vl_7b", 4, 2, 2, 8, "video", 16384)
    plan = native.plan_of(case.recipe().model)
    found = list(islice(native.samples(case, plan, seed=1), 200))
    films = [grid for sample in found for grid in sample.grids if grid[0] > 1]
    assert 60 < len(films) < 140 and {rows * columns for _, rows, columns in films} == {18 * 32}
    assert all(len(sample) <= 16384 for sample in found)
