"""What one rank runs into, all ranks leave by."""

from __future__ import annotations

from pathlib import Path

from ranks import script


def test_a_failure_on_one_rank_reaches_all_and_stages_draw_apart() -> None:
    text = script(Path(__file__).with_name("state_worker.py"), world=2, timeout=90).output
    other = "OtherRankError: the work failed on another rank; its message says why"
    # Two ranks may write on one line.
    assert f"rank 0: {other} | none | True | False | True | True | draws apart" in text
    assert "rank 1: ValueError: disk full | none | True | False | False | False | draws apart" in text
