"""examples/multinode_torchrun.sh on two nodes that are both this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launch import ROOT
from run_data import RunData

from megavlm.parallel.faults import ONCE, VARIABLE

pytestmark = [pytest.mark.reliability, pytest.mark.dist]

STEPS = 60


class Nodes:
    """Two starts of the script that make one run."""

    def __init__(self, data: RunData, output: Path, overrides: str = "", **variables: str) -> None:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        self.output = output
        always = f"training.train_steps={STEPS} parallel.pipeline_model_parallel_size=2 logging.tensorboard=false"
        env = {
            **os.environ, "RECIPE": str(data.root / "recipe.yaml"), "OUTPUT_DIR": str(output), "PYTHON": sys.executable,
            "OVERRIDES": f"{always} {overrides}", "NNODES": "2", "NPROC": "1", "HEAD": "localhost", "PORT": str(port),
            "IFNAME": "lo", "OMP_NUM_THREADS": "1", **variables,
        }  # fmt: skip
        words = ["bash", str(ROOT / "examples" / "multinode_torchrun.sh")]
        self.nodes = [
            subprocess.Popen(words, env=env, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 600
        while max(losses(self.output), default=0) < step:
            assert time.monotonic() < deadline and all(node.poll() is None for node in self.nodes)
            time.sleep(0.05)

    def end(self) -> tuple[list[int], str]:
        """Return the exit codes and all that was printed."""
        texts = []
        try:
            texts = [node.communicate(timeout=600)[0] for node in self.nodes]
        finally:
            for node in self.nodes:
                if node.poll() is None:
                    for one in [*psutil.Process(node.pid).children(recursive=True), node]:
                        one.kill()
        return [node.returncode for node in self.nodes], "\n".join(texts)


def losses(output: Path) -> dict[int, float]:
    found: dict[int, float] = {}
    path = output / "metrics.jsonl"
    for line in map(json.loads, path.read_text().splitlines() if path.exists() else ()):
        if "loss" in line:
            assert found.setdefault(line["step"], line["loss"]) == line["loss"], line["step"]
    return found


def rank_log(output: Path, rank: int) -> str:
    return (output / "logs" / "megavlm" / f"rank-{rank:04}.log").read_text()


def test_a_signal_stops_all_nodes_with_75_and_a_crash_is_started_again(run_data: RunData, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run = Nodes(run_data, output)
    run.wait_for_step(3)
    run.nodes[0].send_signal(signal.SIGTERM)
    codes, text = run.end()
    # A node whose ranks were not asked themselves stops with the others.
    assert codes == [75, 75], text
    stopped = max(losses(output))
    assert 3 <= stopped < STEPS
    (tmp_path / "once").mkdir()
    fault = {VARIABLE: f"step.in_collective:rank1:step{stopped + 5}:kill", ONCE: str(tmp_path / "once")}
    codes, text = Nodes(run_data, output, **fault).end()
    assert codes == [0, 0], text
    assert sorted(losses(output)) == list(range(1, STEPS + 1))
    log = rank_log(output, 0)
    assert log.count("resumed from ") == 2 and f"lost rank 1 (host {socket.gethostname()}" in log


def test_wrong_input_is_not_started_again(run_data: RunData, tmp_path: Path) -> None:
    codes, text = Nodes(run_data, tmp_path / "run", "optimizer.lrr=1").end()
    assert codes == [2, 2] and "megavlm: error: optimizer.lrr: unknown key" in text
    assert rank_log(tmp_path / "run", 0).count("unknown key") == 1
