"""The data path's benchmark runs, in small, and its numbers make sense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import script

ROOT = Path(__file__).resolve().parents[2]


def test_small_run(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    printed = script(ROOT / "benchmarks" / "data_path.py", "--pictures=100", f"--out={out}", world=None).stdout
    result = json.loads(out.read_text())
    assert "| what | how | result |" in printed and f"Command: `{result['command']}`" in printed
    assert all(reader["packs_per_s"] > 0 and reader["padding"] <= 0.01 for reader in result["reader"].values())
    assert result["decoders"]["pil"]["448"]["images_per_s"] > 0
    tiles = result["decoders"]["pil"]["tiles"]
    # Two rates of one measured time, each rounded: they are not equal in the last bit for every time.
    assert tiles["views_per_s"] == pytest.approx(5 * tiles["images_per_s"]) and tiles["images_per_s"] > 0
    assert result["reader_of_tiles"]["padding"] <= 0.02
    padding = result["padding"]
    assert 0 <= padding["carry_over"] <= 0.01 < padding["none"] and padding["first_fit_decreasing"] < padding["none"]
