"""What ranks say of themselves, and who is blamed."""

from __future__ import annotations

from pathlib import Path

from megavlm.training.heartbeat import Heartbeat, blame, read_heartbeats


def test_files_of_an_earlier_larger_start_go(tmp_path: Path) -> None:
    for rank in range(4):
        Heartbeat(tmp_path, rank, 4).beat(3, "training", now=True)
    assert [facts["rank"] for facts in read_heartbeats(tmp_path)] == [0, 1, 2, 3]
    for rank in (1, 0):
        Heartbeat(tmp_path, rank, 2).beat(4, "training", now=True)
    assert [(facts["rank"], facts["step"]) for facts in read_heartbeats(tmp_path)] == [(0, 4), (1, 4)]


def test_the_first_that_failed_blames_those_that_say_nothing(tmp_path: Path) -> None:
    for rank, phase in enumerate(("failed", "training", "failed")):
        Heartbeat(tmp_path, rank, 3).beat(5, phase, now=True)
    line = blame(tmp_path, 0, 5)
    assert line is not None and line.startswith("step 5: lost rank 1 (host ") and "rank 2" not in line
    assert blame(tmp_path, 2, 5) is None


def test_a_file_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    beat = Heartbeat(tmp_path, 0, 1)
    beat.path.with_suffix(".new").mkdir()  # root may write anywhere, but not into a directory
    beat.beat(1, "training", now=True)
    assert read_heartbeats(tmp_path) == []
