"""One run at a time in an output_dir, nothing that outlives a killed one, and errors that are said once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from launch import ROOT
from run_data import RunData
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megavlm.checkpoint.manifest import check
from megavlm.cli import main

ENDLESS = ("training.train_steps=100000", "checkpoint.save_interval=2", "optimizer.schedule=constant")
OUR_LINE = "megavlm: error: "


def command(words: list[str], ranks: int = 1, restarts: int = 0) -> list[str]:
    """Return a command line of ``megavlm``, under torchrun for several ranks."""
    if ranks == 1:
        return [sys.executable, "-m", "megavlm", *words]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d"]
    return [*torchrun, "--rdzv-endpoint=localhost:0", f"--max-restarts={restarts}", "-m", "megavlm", *words]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", **more}


@contextmanager
def running(words: list[str], log: Path, *before: str, ranks: int = 1) -> Iterator[subprocess.Popen[bytes]]:
    """Start a run; whatever is left of it ends with the block."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*before, *command(words, ranks)], stdout=file, stderr=subprocess.STDOUT, env=environment(),
            start_new_session=True,
        )  # fmt: skip
    family: list[psutil.Process] = []
    try:
        yield process
    finally:
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
        for one in [*family, process]:
            try:
                one.kill()
            except psutil.NoSuchProcess:
                pass
        process.wait()


def done(words: list[str], ranks: int = 1, limit: float = 600, **variables: str) -> tuple[int, str]:
    """Run to the end; return exit code and output."""
    found = subprocess.run(
        command(words, ranks), capture_output=True, text=True, env=environment(**variables), timeout=limit, check=False
    )
    return found.returncode, found.stdout + found.stderr


def wait_for(condition: Callable[[], bool], limit: float = 600) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.05)


def steps(output: Path) -> list[int]:
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [line["step"] for line in map(json.loads, (x for x in lines if x.endswith("\n"))) if "loss" in line]


def of_rank(output: Path, rank: int) -> psutil.Process:
    return psutil.Process(json.loads((output / "heartbeats" / f"rank-{rank}.json").read_text())["pid"])


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.reliability
def test_a_second_run_is_refused_and_a_killed_ones_successor_goes_on_at_once(
    run_data: RunData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    words = run_data.words(output, *ENDLESS, "data.num_workers=2", "checkpoint.lock_timeout_seconds=600")
    with running(words, tmp_path / "log") as first:
        wait_for(lambda: len(steps(output)) >= 5)
        for ranks in (1, 2):
            code, text = done(words, ranks)
            assert code in (2, 1)[ranks - 1 :], text
            assert text.count(f"{OUR_LINE}output_dir: {output} is held by megavlm train (on host ") == 1
            assert text.count("is held by") == 1 and f"process {first.pid}, since" in text
            assert "File " not in text.partition("torch/distributed/")[0]
        assert first.poll() is None
        assert main(["doctor", str(output)]) == 0 and "which lives" in capsys.readouterr().out
        readers = psutil.Process(first.pid).children(recursive=True)
        assert len(readers) >= 2
        first.kill()
        first.wait()
        wait_for(lambda: all(map(is_gone, readers)))
    assert main(["doctor", str(output)]) == 1
    assert "is dead: the next start goes on at once" in capsys.readouterr().out
    reached = max(steps(output)) + 6
    code, text = done([*words, f"training.train_steps={reached}"], limit=590)  # the lock's time-out is longer
    assert code == 0 and "resumed from" in text, text
    assert steps(output) == list(range(1, reached + 1))
    assert not (output / "lock.json").exists()
    # TensorBoard shows each step once as well.
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/total")] == list(range(1, reached + 1))


@pytest.mark.reliability
@pytest.mark.dist
def test_readers_of_a_killed_rank_are_gone_before_the_others_notice(run_data: RunData, tmp_path: Path) -> None:
    output = tmp_path / "run"
    words = run_data.words(output, *ENDLESS, "data.num_workers=1")
    with running(words, tmp_path / "log", ranks=2):
        wait_for(lambda: len(steps(output)) >= 2)
        rank = of_rank(output, 1)
        readers = rank.children(recursive=True)
        assert readers
        for reader in readers:
            reader.terminate()  # as Slurm does; it leaves that to its rank
        rank.kill()
        wait_for(lambda: all(map(is_gone, readers)))


@pytest.mark.reliability
def test_a_run_that_was_hung_for_too_long_stops_before_it_writes(run_data: RunData, tmp_path: Path) -> None:
    """It is stopped; another container, which cannot see it, takes over after the time-out; then it wakes up."""
    output = tmp_path / "run"
    words = run_data.words(output, *ENDLESS, "checkpoint.lock_timeout_seconds=5", "logging.tensorboard=false")
    other = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    if subprocess.run([*other, "true"], check=False).returncode:
        pytest.skip("namespaces are not permitted here")
    with running(words, tmp_path / "first") as first:
        wait_for(lambda: len(steps(output)) >= 5)
        with running(words, tmp_path / "refused", *other) as second:
            assert second.wait(600) == 2
        assert "is held by megavlm train (on host" in (tmp_path / "refused").read_text()
        first.send_signal(signal.SIGSTOP)
        with running(words, tmp_path / "second", *other) as second:
            wait_for(lambda: "resumed from" in (tmp_path / "second").read_text())
            at = len(steps(output))
            wait_for(lambda: len(steps(output)) > at + 2)
            first.send_signal(signal.SIGCONT)
            assert first.wait(600) == 1
            text = (tmp_path / "first").read_text()
            assert text.count(OUR_LINE) == 1 and "it is held by megavlm train (on host" in text
            assert "Traceback" not in text
            at = len(steps(output))
            wait_for(lambda: len(steps(output)) > at + 3)
            assert second.poll() is None
    found = steps(output)
    assert found == list(range(1, max(found) + 1))
    for path in (output / "checkpoints").glob("step-????????"):
        check(path)


@pytest.mark.dist
def test_a_refusal_is_said_once_under_torchrun(run_data: RunData, tmp_path: Path) -> None:
    """Of the recipe, of its files, and of what only the ranks together find out; without a stack of ours."""
    (tmp_path / "file").write_text("mine")
    cases = {
        "optimizer.lrr=1": "optimizer.lrr: unknown key",
        "data.train.0.path=/nowhere": "data.train.0.path: no file or directory '/nowhere'",
        f"output_dir={tmp_path / 'file' / 'run'}": f"output_dir: {tmp_path / 'file' / 'run'}: ",
    }
    for override, line in cases.items():
        code, text = done([*run_data.words(tmp_path / "run"), override], ranks=2)
        assert code == 1 and text.count(line) == text.count(OUR_LINE) == 1, text
        assert "megavlm/cli.py" not in text


@pytest.mark.reliability
@pytest.mark.dist
def test_what_the_ranks_find_out_together_is_said_once(run_data: RunData, tmp_path: Path) -> None:
    """All of them see the first, and one alone the second."""
    output = tmp_path / "run"
    words = run_data.words(output, "training.train_steps=3", "logging.tensorboard=false")
    assert done(words, ranks=2)[0] == 0
    code, text = done([*words, "training.train_steps=4", "model.language.num_layers=2"], ranks=2)
    assert code == 1 and text.count("model.language.num_layers: 2, but") == text.count(OUR_LINE) == 1, text
    assert "megavlm/" not in text.replace("megavlm/cli.py", ""), text
    code, text = done([*words, "training.train_steps=4", "training.seed=7"], ranks=2)
    assert code == 1 and text.count(OUR_LINE) >= 1 and "Traceback" not in text.partition("torch/distributed")[0], text


@pytest.mark.reliability
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
@pytest.mark.dist
def test_a_disk_that_fills_up_costs_one_line_and_the_run_goes_on_after_it(run_data: RunData, tmp_path: Path) -> None:
    """Every rank writes to it; what is said, with the path and what to do, is said once."""
    (tmp_path / "small").mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", str(tmp_path / "small")], check=False
    ).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        output = tmp_path / "small" / "run"
        words = run_data.words(output, "checkpoint.save_interval=2", "logging.tensorboard=false")
        for ranks, code in ((1, 1), (2, 1)):
            found, text = done([*words, f"parallel.tensor_model_parallel_size={ranks}"], ranks)
            assert found == code and text.count(OUR_LINE) == 1, text
            assert "No space left on device; free some space there, or choose another directory" in text
            assert "megavlm/training/loop.py" not in text
        for path in (output / "checkpoints").glob("step-????????"):
            check(path)
        subprocess.run(["mount", "-o", "remount,size=60m", str(tmp_path / "small")], check=True)
        code, text = done(words)
        assert code == 0 and "resumed from" in text, text
    finally:
        subprocess.run(["umount", str(tmp_path / "small")], check=True)
