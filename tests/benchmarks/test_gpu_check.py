"""The GPU check's plumbing, on the CPU: its rows, its report, and what it does where there is no GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_dry_run_runs_every_row_that_needs_no_gpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    done = _run("--dry-run-cpu", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert out.read_text() == done.stdout
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if "|" in line]
    status = {row[0]: row[1] for row in rows if len(row) == 3 and row[0] not in ("check", "---")}
    assert status["fp32, torch layers: this device against the CPU"] == "ok"
    assert status["bf16 against fp32, torch layers"] == "ok"
    assert status["bf16 step, small model, torch layers"] == "ok"
    assert status["bf16, Transformer Engine against torch layers"] == "not run"
    dali = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    assert status["DALI decodes JPEGs as PIL does"] == ("ok" if dali else "not run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_line_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    done = _run("--out", out)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "no CUDA device" in done.stderr
    assert not out.exists()


def _module() -> object:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


def test_a_failed_job_is_a_failed_row_with_its_error_and_log(tmp_path: Path) -> None:
    gpu_check = _module()
    run = gpu_check.Runner(60, on_cpu=True)
    outcome = run("nonsense", {"kind": "nonsense"})
    assert outcome.result is None
    assert "KeyError" in outcome.error
    row = gpu_check._one("a row", outcome, str)
    assert row.status == "failed"
    report = gpu_check.markdown([row], [], run, 1.0)
    assert "## Output of the failed job: nonsense" in report and "Traceback" in report


def test_losses_that_differ_or_are_not_numbers_fail() -> None:
    gpu_check = _module()

    def outcome(loss: float) -> object:
        return gpu_check.Outcome({"losses": [loss, loss], "grad_norms": [1.0, 1.0]})

    assert gpu_check._compared("r", outcome(2.0), outcome(2.0), 1e-4).status == "ok"
    assert gpu_check._compared("r", outcome(2.0), outcome(2.01), 1e-4).status == "failed"
    assert gpu_check._compared("r", outcome(float("nan")), outcome(2.0), 1e-4).status == "failed"
    assert gpu_check._compared("r", gpu_check.Outcome(None, "E"), outcome(2.0), 1e-4).detail == "E"
