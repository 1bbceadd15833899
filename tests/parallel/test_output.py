"""Directories that cannot be written to: said before anything starts, with what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megavlm.config.errors import RecipeError, disk_problem
from megavlm.parallel.lock import HeldError
from megavlm.parallel.output import holding, try_writing
from megavlm.parallel.state import process_groups


@contextlib.contextmanager
def mounted(at: Path, options: str) -> Iterator[Path]:
    """A small disk of its own."""
    at.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(at)], check=False).returncode
    ):
        pytest.skip("mounting is not permitted here")
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


def refused(directory: Path) -> str:
    with pytest.raises(RecipeError) as error:
        try_writing(directory)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_nothing_is_left_of_the_trial(tmp_path: Path) -> None:
    try_writing(tmp_path / "a" / "b" / "run")
    assert not list(tmp_path.iterdir())
    for name in ("run/checkpoints", "run/heartbeats"):
        (tmp_path / name).mkdir(parents=True)
    try_writing(tmp_path / "run")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoints", "heartbeats", "run"]
    try_writing(os.path.relpath(tmp_path / "run"))


def test_a_file_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "file/run", "file/a/run", "link"):
        line = refused(tmp_path / name)
        assert line.startswith(f"output_dir: {tmp_path / name}: ") and "move the file that is in the way" in line
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("existing", [True, False])
def test_a_read_only_disk(tmp_path: Path, existing: bool) -> None:
    with mounted(tmp_path / "disk", "size=1m") as disk:
        (disk / "run").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        line = refused(disk / "run" if existing else disk / "other" / "run")
    assert line.startswith(f"output_dir: {disk}/") and "Read-only file system; mount it for writing" in line
    assert line.endswith("or choose another directory")


@pytest.mark.parametrize("options", ["size=64k", "nr_inodes=3"], ids=["no room", "no more files"])
def test_a_full_disk(tmp_path: Path, options: str) -> None:
    with mounted(tmp_path / "disk", options) as disk:
        (disk / "run").mkdir()
        (disk / "run" / "big").write_bytes(bytes(1 << 15))
        line = refused(disk / "run")
        assert sorted(path.name for path in (disk / "run").iterdir()) == ["big"]
    assert "No space left on device; free some space there, or choose another directory" in line


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_directory_of_another_user(tmp_path: Path) -> None:
    """A part of it too: a run that root started once, and that somebody goes on with."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for one in (tmp_path, *tmp_path.parents):
        if not one.stat().st_mode & 1:
            one.chmod(one.stat().st_mode | 0o011)
    (tmp_path / "run").chmod(0o777)
    code = f"from megavlm.parallel.output import try_writing as t; import sys; t({str(tmp_path / 'run')!r})"
    words = ["setpriv", "--reuid=12345", "--clear-groups", os.sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if "megavlm" not in done.stderr:
        pytest.skip(f"the interpreter is not for other users here: {done.stderr[-200:]}")
    assert "Permission denied; let this user write there" in done.stderr


def test_whose_problem_an_error_is(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    assert "free some space" in str(disk_problem(full, tmp_path))
    inside = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "checkpoints" / "x"))
    assert str(disk_problem(inside, tmp_path)).startswith(f"{tmp_path / 'checkpoints' / 'x'}: Permission denied")
    assert disk_problem(OSError(errno.EIO, "Input/output error"), tmp_path) is None  # a shard that is read, say
    assert disk_problem(FileNotFoundError(errno.ENOENT, "No such file", "/data/x"), tmp_path) is None


def test_one_job_holds_it(tmp_path: Path) -> None:
    from megavlm.config.schema import ParallelConfig

    with process_groups(ParallelConfig(), 1):
        with holding(tmp_path / "a" / "run", "train", "output_dir", 60) as lock:
            assert not lock.lost() and (tmp_path / "a" / "run" / "lock.json").is_file()
            with pytest.raises(HeldError, match=f"^output_dir: {tmp_path}/a/run is held by megavlm train "):
                holding(tmp_path / "a" / "run", "eval", "output_dir", 60).__enter__()
        assert not list((tmp_path / "a" / "run").iterdir())
    with contextlib.ExitStack() as leaving:  # the first rank still writes when the groups are gone
        with process_groups(ParallelConfig(), 1), holding(tmp_path / "a" / "run", "train", "output_dir", 60, leaving):
            pass
        leaving.callback(lambda: found.append((tmp_path / "a" / "run" / "lock.json").is_file()))
        found: list[bool] = []
    assert found == [True] and not list((tmp_path / "a" / "run").iterdir())
