"""A killed ``megavlm prepare`` leaves no data set, and the next run starts as if it had not been."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megavlm.data.publish import clear_leftovers, new_directory

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
        deadline = time.monotonic() + 60
        while not list(out.parent.glob(".out.partial-*/shard-000002.tar")) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not out.exists()
        process.send_signal(number)
        process.communicate(timeout=60)
    left = names(out.parent)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert len(left) == (number == signal.SIGKILL)
    source.unlink()
    source.write_text(LINE * 4)
    process = start(source, out)
    _, err = process.communicate(timeout=60)
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
