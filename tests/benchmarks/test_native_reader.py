"""The benchmark of films and pictures of real sizes runs, in small, and its numbers make sense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import script

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
def test_small_run(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    words = ["--seconds=0.1", "--films=1", "--pictures=2", "--samples=12", "--packs=1", "--sequence-length=4096"]
    printed = script(ROOT / "benchmarks" / "native_reader.py", *words, f"--out={out}", world=None).stdout
    result = json.loads(out.read_text())
    films, pictures, feeding = result["films"], result["pictures"], result["feeding"]
    assert (films["frames_shown"], films["frames_of_the_films"]) == (8, 100)  # two a second of four seconds
    assert films["through"]["per_core"] == pytest.approx(films["shown"]["per_core"] * 100 / 8)
    assert pictures["patches_a_picture"] > 0 and pictures["native"]["per_core"] > 0
    assert feeding["films"] + feeding["pictures"] > 0 and feeding["gpu_seconds_a_pack"] > 0
    assert feeding["cores_decoding"] == pytest.approx(feeding["decoding"] / feeding["gpu_seconds_a_pack"])
    assert f"**{feeding['cores_decoding']:.2f}** that decode" in printed
