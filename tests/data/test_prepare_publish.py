"""A killed ``megavlm prepare`` leaves no data set, and the next run starts as if it had not been."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megavlm.data.publish import _where, clear_leftovers, new_directory
from megavlm.parallel.processes import this_process

LINE = json.dumps({"conversations": [{"from": "user", "value": "Hi."}, {"from": "assistant", "value": "Ho."}]}) + "\n"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def start(source: Path, out: Path) -> subprocess.Popen:
    words = ["prepare", str(source), "--format", "qwen-vl", "--out", str(out), "--samples-per-shard", "1"]
    return subprocess.Popen([sys.executable, "-m", "megavlm", *words], stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda n: n.name)
def test_a_killed_run_can_be_run_again(tmp_path: Path, number: signal.Signals) -> None:
    source, out = tmp_path / "source.jsonl", tmp_path / "data" / "out"
    os.mkfifo(source)  # so that it waits for more
    process = start(source, out)
    with source.open("w") as file:
        file.write(LINE * 3)
        file.flush()
        deadline = time.monotonic() + 600
        while not list(out.parent.glob(".out.partial-*/shard-000002.tar")) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert list(out.parent.glob(".out.partial-*/shard-000002.tar")) and not out.exists()
        process.send_signal(number)
        process.communicate(timeout=600)
    left = names(out.parent)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert len(left) == (2 if number == signal.SIGKILL else 0)  # what it wrote, and its lock
    source.unlink()
    source.write_text(LINE * 4)
    process = start(source, out)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert names(out.parent) == ["out"]
    assert len(list(out.glob("shard-*.tar"))) == 4


def test_an_old_directory_that_was_moved_aside_comes_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_directory(out) as partial:
        (partial / "a").write_text("first")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = os.uname().nodename
    aside = tmp_path / f".out.old-{host}-{dead.pid}-x"
    aside.mkdir()
    out.rename(aside / "out")  # as a run with --overwrite that was killed here
    other = tmp_path / ".out.partial-elsewhere-1-x"  # another machine's, which may be at work
    other.mkdir()
    running = tmp_path / f".out.partial-{host}-{os.getppid()}-x"
    running.mkdir()
    clear_leftovers(out)
    assert names(tmp_path) == sorted([other.name, running.name, "out"])
    assert (out / "a").read_text() == "first"


def test_what_fails_leaves_the_old_directory(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_directory(out) as partial:
        (partial / "a").write_text("first")
    with pytest.raises(KeyError), new_directory(out) as partial:
        (partial / "a").write_text("second")
        raise KeyError
    assert names(tmp_path) == ["out"]
    assert (out / "a").read_text() == "first"


def test_two_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_directory(out) as partial:
        (partial / "a").write_text("first")
        with pytest.raises(ValueError, match=r"--out .*/out is held by megavlm prepare \(on host "), new_directory(out):
            raise AssertionError
    assert names(tmp_path) == ["out"] and (out / "a").read_text() == "first"


@pytest.mark.parametrize("replace", [True, False])
def test_what_came_meanwhile_is_replaced_only_where_that_was_asked_for(tmp_path: Path, replace: bool) -> None:
    out = tmp_path / "out"

    def write() -> None:
        with new_directory(out, replace=replace) as partial:
            (partial / "a").write_text("ours")
            out.mkdir()
            (out / "a").write_text("theirs")

    if replace:
        write()
    else:
        with pytest.raises(ValueError, match="something was put there meanwhile, and is left as it is"):
            write()
    assert names(tmp_path) == ["out"] and (out / "a").read_text() == ("ours" if replace else "theirs")


def test_the_work_of_another_container_is_left_alone(tmp_path: Path) -> None:
    """It has our host name, and its process numbers say nothing here."""
    host, us = os.uname().nodename, this_process()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    ours = tmp_path / f".out.partial-{host}-{dead.pid}-{_where(us)}.1-x"
    reused = tmp_path / f".out.partial-{host}-{os.getppid()}-{_where(us)}.1-x"  # another process's number now
    theirs = tmp_path / f".out.partial-{host}-{dead.pid}-{_where(dataclasses.replace(us, boot='b'))}.1-x"
    alive = tmp_path / f".out.partial-{host}-{us.pid}-{_where(us)}.{us.start}-x"
    for path in (ours, reused, theirs, alive):
        path.mkdir()
    clear_leftovers(tmp_path / "out")
    assert names(tmp_path) == sorted([theirs.name, alive.name])
