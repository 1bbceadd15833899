"""A directory appears whole or not at all, and what is there is left alone."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from hf_makers import digest

from megavlm.checkpoint.publish import publishing
from megavlm.config.errors import MachineError
from megavlm.parallel import lock


def fill(partial: Path) -> None:
    (partial / "a").write_text("new")
    (partial / "sub").mkdir()
    (partial / "sub" / "b").write_text("new")


def test_it_appears_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    with publishing(out) as partial:
        fill(partial)
        assert not out.exists() and partial.parent == out.parent
    assert set(digest(out)) == {"a", "sub", "sub/b"} and not partial.exists()


def test_an_empty_directory_may_be_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with publishing(tmp_path / "out") as partial:
        fill(partial)
    assert (tmp_path / "out" / "a").read_text() == "new"


@pytest.mark.parametrize("what", ["folder", "file", "dangling link", "hidden file"])
def test_what_exists_is_left_as_it_is(what: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if what == "file":
        out.write_text("mine")
    elif what == "dangling link":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.mkdir()
        (out / (".hidden" if what == "hidden file" else "mine")).write_text("mine")
    before = digest(tmp_path)
    with pytest.raises(ValueError, match="exists already and is left as it is"), publishing(out):
        raise AssertionError
    assert digest(tmp_path) == before


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1), OSError(errno.ENOSPC, "full")])
def test_a_failure_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, publishing(tmp_path / "out") as partial:
        fill(partial)
        raise error
    assert not list(tmp_path.iterdir())
    if isinstance(caught.value, OSError):
        assert caught.value.filename == str(tmp_path / "out")


def test_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "out.partial"
    (left / "old").mkdir(parents=True)
    (left / "old" / "x").write_text("old")
    (left / "link").symlink_to(tmp_path)
    with publishing(tmp_path / "out") as partial:
        assert not list(partial.iterdir())
        fill(partial)
    assert set(digest(tmp_path)) == {"out", "out/a", "out/sub", "out/sub/b"}


def test_two_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with publishing(out) as partial:
        fill(partial)
        with pytest.raises(ValueError, match=r"/out is held by megavlm convert \(on host "), publishing(out):
            raise AssertionError
        assert (partial / "a").read_text() == "new"
    assert (out / "a").is_file()


def test_another_was_quicker(tmp_path: Path) -> None:
    """It published between the end of our work and our renaming."""
    out = tmp_path / "out"
    with pytest.raises(OSError, match="not empty"), publishing(out) as partial:
        fill(partial)
        out.mkdir()
        (out / "theirs").write_text("theirs")
    assert set(digest(tmp_path)) == {"out", "out/theirs"}


@pytest.mark.parametrize("kind", ["file", "link"])
def test_something_else_has_the_partial_name(kind: str, tmp_path: Path) -> None:
    other = tmp_path / "precious"
    other.mkdir()
    (other / "x").write_text("x")
    blocking = tmp_path / "out.partial"
    blocking.write_text("x") if kind == "file" else blocking.symlink_to(other)
    before = digest(tmp_path)
    with pytest.raises(ValueError, match=r"out\.partial: is in the way"), publishing(tmp_path / "out"):
        raise AssertionError
    assert digest(tmp_path) == before


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with (
        pytest.raises(ValueError, match=r"needs \d+\.\d GiB, and \d+\.\d GiB are free"),
        publishing(tmp_path / "out", needed_bytes=2 * free + (1 << 40)),
    ):
        raise AssertionError
    assert not list(tmp_path.iterdir())


def test_everything_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def record(handle: int) -> None:
        events.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        fsync(handle)

    def renamed(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(Path, "rename", renamed)
    with publishing(tmp_path / "out") as partial:
        del events[:]  # of the lock
        fill(partial)
    at = events.index("rename")
    partial_names = {str(partial), str(partial / "a"), str(partial / "sub"), str(partial / "sub" / "b")}
    assert set(events[:at]) == partial_names and events[at + 1 :] == [str(tmp_path)]


def test_another_host_took_it_over(tmp_path: Path) -> None:
    """As we were hung: what it writes is neither published nor removed by us."""
    out = tmp_path / "out"
    with pytest.raises(MachineError, match="lost the lock"), publishing(out) as partial:
        fill(partial)
        (tmp_path / ".out.lock").unlink()
        monkeypatched = pytest.MonkeyPatch()
        now = lock._now()
        monkeypatched.setattr(lock, "_now", lambda: now + 61)
    monkeypatched.undo()
    assert not out.exists() and (partial / "a").read_text() == "new"
