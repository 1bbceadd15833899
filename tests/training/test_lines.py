"""After a restart each step is in a run's files once."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from megavlm.training.lines import drop_steps_after, undone


def text(*steps: int) -> str:
    return "".join(json.dumps({"step": step, "loss": step / 2}) + "\n" for step in steps)


def test_steps_that_are_taken_again_move_away(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text(1, 2, 2, 3, 4) + '{"step": 5, "lo')
    drop_steps_after(path, 2)
    assert path.read_text() == text(1, 2, 2) and undone(path).read_text() == text(3, 4)
    path.write_text(text(1, 2, 3))
    drop_steps_after(path, 1)
    assert path.read_text() == text(1) and undone(path).read_text() == text(3, 4, 2, 3)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["metrics.jsonl", "metrics.undone.jsonl"]


@pytest.mark.parametrize("content", ["", text(1, 2), text(2, 1)])
def test_what_is_whole_is_not_touched(tmp_path: Path, content: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    before = path.stat()
    drop_steps_after(path, 2)
    assert path.read_text() == content and path.stat().st_ino == before.st_ino and not undone(path).exists()
    drop_steps_after(tmp_path / "none.jsonl", 2)


def test_a_start_from_nothing_takes_every_step_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text(1, 2))
    drop_steps_after(path, 0)
    assert path.read_text() == "" and undone(path).read_text() == text(1, 2)


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"loss": 1}', '{"step": null}', "\x00" * 9, "[" * 99_999])
def test_broken_lines_go(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text(1) + line + "\n" + text(2))
    drop_steps_after(path, 5)
    assert path.read_text() == text(1, 2)


def test_a_link_stays_one_and_a_device_is_left_alone(tmp_path: Path) -> None:
    path, target = tmp_path / "metrics.jsonl", tmp_path / "elsewhere.jsonl"
    target.write_text(text(1, 2))
    path.symlink_to(target)
    drop_steps_after(path, 1)
    assert path.is_symlink() and target.read_text() == text(1)
    path.unlink()
    path.symlink_to("/dev/full")
    drop_steps_after(path, 1)


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "metrics.jsonl"
    path.write_text(text(1, 2))
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        drop_steps_after(path, 1)
    assert path.read_text() == text(1, 2)
