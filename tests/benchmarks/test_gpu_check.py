"""The GPU check's plumbing, on the CPU: its rows, its report, and what it does where there is no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=2400)


@pytest.mark.long
@pytest.mark.slow
def test_dry_run_runs_every_row_that_needs_no_gpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    done = _run("--dry-run-cpu", "--out", out, "--timeout", 900, "--limit", 2300, "--gpus", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert out.read_text() == done.stdout
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if "|" in line]
    status = {row[0]: row[1] for row in rows if len(row) == 3 and row[0] not in ("check", "---")}
    assert status["fp32, torch layers: this device against the CPU"] == "ok"
    assert status["bf16 against fp32, torch layers"] == "ok"
    assert status["bf16 attention, torch"] == "ok"
    assert status["small model, BF16, torch layers"] == "ok"
    assert status["small model, BF16, torch layers: the planner's prediction"] == "ok"
    for name in ("bf16 attention, Transformer Engine", "bf16, Transformer Engine against torch layers"):
        assert status[name] == "not run"
    for scaling in ("tensorwise", "delayed", "blockwise", "mxfp8"):
        assert status[f"FP8 ({scaling}) against bf16, Transformer Engine"] == "not run"
    for kind in ("BF16", "FP8 (tensorwise)", "FP8 (delayed)"):
        assert status[f"small model, {kind}"] == "not run"
    dali = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    assert status["dali decodes JPEGs as PIL does"] == ("ok" if dali else "not run")
    for name in ("pil decodes JPEGs as PIL does", "simplejpeg decodes JPEGs as PIL does", "saving a checkpoint"):
        assert status[name] == "ok"
    for mix in ("unseen packs", "picture-heavy", "text-heavy"):
        assert [name for name, value in status.items() if name.endswith(mix) and value == "ok"]
    families = ("Qwen2.5-VL-7B", "Qwen3-VL-30B-A3B", "Llama-3.2-Vision-11B", "CogVLM", "PaliGemma-3B", "Cobra-3B")
    families += ("CogAgent", "Chameleon-7B", "PaLI-3")
    for family in families:
        rows_of = {name: value for name, value in status.items() if name.startswith(f"{family} slice")}
        assert len(rows_of) == 2 and set(rows_of.values()) == {"ok"}, rows_of
    assert status["Mamba's convolution and scan of a pack, forward and backward"] == "ok"
    assert status["experts, EP 2 against one GPU"] == "ok"
    assert status["experts, EP 2 x TP 2 + SP against one GPU"] == "not run"
    for layout in ("TP 2", "PP 2", "CP 2", "PP 2 x VPP 2", "DP 2", "DP 2, overlapped"):
        assert status[f"{layout} against one GPU"] == "ok"
    assert status["TP 2 x PP 2 + SP against one GPU"] == "not run"
    figures = json.loads(out.with_suffix(".json").read_text())
    assert {row["name"]: row["status"] for row in figures["rows"]} == status
    timed = figures["jobs"]["small model, BF16, torch layers"]
    assert timed["tokens_per_s"] > 0 and timed["images_per_s"] > 0 and timed["predicted_gib"] > 0
    experts = next(job for name, job in figures["jobs"].items() if "experts)" in name)
    assert experts["predicted_gib"] > 0 and experts["tokens_per_s"] > 0 and "unpredicted" not in experts
    assert timed["mfu"] is None and timed["peak_gib"] is None  # nothing is made up on a CPU
    assert figures["rates"]["matmul"] and figures["rates"]["attention"] and figures["rates"]["copy"]
    packed = figures["jobs"]["attention, torch"]["cases"]["packed causal"]
    assert 0 < packed["output"] < 0.02 and 0 < packed["gradient"] < 0.02


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_line_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    done = _run("--out", out)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "no CUDA device" in done.stderr
    assert not out.exists()


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


def test_a_failed_job_is_a_failed_row_with_its_error_and_log(gpu_check: Any) -> None:
    run = gpu_check.Runner(60, on_cpu=True)
    outcome = run("nonsense", {"kind": "nonsense"})
    assert outcome.result is None
    assert "KeyError" in outcome.error
    row = gpu_check._one("a row", outcome, str)
    assert row.status == "failed"
    report = gpu_check.markdown([row], [], run, 1.0)
    assert "## Output of the failed job: nonsense" in report and "Traceback" in report


def test_a_case_of_attention_that_fails_hides_no_other(gpu_check: Any) -> None:
    cases = {"causal": {"output": 0.01, "gradient": 0.005}, "cross": {"error": "RuntimeError: no kernel"}}
    row = gpu_check._attention("attention", gpu_check.Outcome({"cases": cases}))
    assert row.status == "failed" and "causal 1.0e-02" in row.detail and "cross: RuntimeError: no kernel" in row.detail


def test_parts_are_asked_for_by_name(gpu_check: Any, tmp_path: Path) -> None:
    out = tmp_path / "part.md"
    done = _run("--dry-run-cpu", "--out", out, "--only", "rates")
    assert done.returncode == 0, done.stderr
    rows = [line for line in out.read_text().splitlines() if line.startswith("| ") and " ok " in line]
    assert len(rows) == 1 and rows[0].startswith("| rates of products")
    assert _run("--dry-run-cpu", "--only", "everything").returncode == 2


def test_losses_that_differ_or_are_not_numbers_fail(gpu_check: Any) -> None:
    def outcome(loss: float) -> object:
        return gpu_check.Outcome({"losses": [loss, loss], "grad_norms": [1.0, 1.0]})

    assert gpu_check._compared("r", outcome(2.0), outcome(2.0), 1e-4).status == "ok"
    assert gpu_check._compared("r", outcome(2.0), outcome(2.01), 1e-4).status == "failed"
    assert gpu_check._compared("r", outcome(float("nan")), outcome(2.0), 1e-4).status == "failed"
    untaken = gpu_check.Outcome({"losses": [2.0, 2.0], "grad_norms": [1.0, None]})  # a step that was not taken
    assert gpu_check._compared("r", untaken, outcome(2.0), 1e-4).status == "failed"
    assert gpu_check._compared("r", gpu_check.Outcome(None, "E"), outcome(2.0), 1e-4).detail == "E"


def test_jobs_of_one_process_hide_each_other_in_nothing(gpu_check: Any) -> None:
    run = gpu_check.Runner(300, on_cpu=True)
    bad, good, again = {"kind": "nonsense"}, {"kind": "scan", "small": True}, {"kind": "nonsense", "number": 2}
    run.together([bad, good, again])
    first = run("bad", bad)
    assert "KeyError" in first.error and "Traceback" in first.log
    process = run._at_work._process.pid
    assert run("good", good).result["torch_ms"] > 0
    assert run._at_work._process.pid == process  # none of its own
    last = run("again", again)  # behind others it is tried alone before it counts as failed
    assert run._at_work is None and "exit code 1: KeyError" in last.error
    run.close()


def test_a_process_that_ends_or_hangs_takes_one_job_along(gpu_check: Any) -> None:
    jobs = [{"kind": "scan", "small": True, "number": number} for number in range(2)]
    keys = [json.dumps(job) for job in jobs]
    several = sys.modules["gpu_runner"]._Several(keys, gpu_check.Runner(9, on_cpu=True)._environment({}))
    several._process.kill()
    assert "exit code -9" in several.wait(keys[0], 60).error
    assert not several.gives(keys[1])
    several.close()
    run = gpu_check.Runner(0.01, on_cpu=True)
    run.together(jobs)
    assert "took longer than" in run("slow", jobs[0]).error
    run.timeout = 300
    assert run("next", jobs[1]).result is not None
    run.close()


def test_nothing_starts_when_the_time_for_the_whole_is_up(gpu_check: Any) -> None:
    run = gpu_check.Runner(60, on_cpu=True, limit=5)
    outcome = run("late", {"kind": "nonsense"})
    assert outcome.skipped and "time" in outcome.error
    row = gpu_check._one("late", outcome, str)
    assert row.status == "not run"
    assert "## Output" not in gpu_check.markdown([row], [], run, 1.0)


def test_what_a_machine_cannot_do_is_not_run_and_says_why(gpu_check: Any) -> None:
    engine = {"fp8": "hybrid"}
    job = {"kind": "train", "size": "small", "precision": "bf16", "impl": "auto", "steps": 1, "warmup": 0}
    outcome = gpu_check.Runner(120, on_cpu=True)("fp8", {**job, "engine": engine})
    assert outcome.skipped and "engine.fp8: there is no CUDA device; install" in outcome.error


@pytest.mark.parametrize(
    ("size", "layers"),
    [(16, 0), (24, 0), (40, 3), (79.1, 8), (139.8, 8)],
)
def test_the_slice_has_as_many_layers_as_fit(gpu_check: Any, size: float, layers: int) -> None:
    assert gpu_check.slice_layers(size) == layers


def test_goals_and_predictions_are_judged(gpu_check: Any) -> None:
    result = {
        "losses": [2.0, 1.9], "grad_norms": [1.0, 1.0], "parameters": 10**9, "layers": 8, "step_ms": 400.0,
        "tokens_per_s": 20_000.0, "images_per_s": 45.0, "model_tflops": 520.0, "mfu": 0.526, "mfu_fp8_peak": None,
        "predicted_gib": 60.0, "peak_gib": 65.0, "predicted_step_ms": 500.0,
    }  # fmt: skip
    speed, told = gpu_check._timed("BF16", gpu_check.Outcome(result))
    without = gpu_check._timed("BF16, torch layers", gpu_check.Outcome(result))[0]
    assert "goal 45% MFU: reached" in without.detail
    assert (
        speed.status == "ok"
        and "MFU 52.6% of the bf16 peak" in speed.detail
        and "goal 50% MFU: reached" in speed.detail
    )
    assert "memory, GiB: predicted 60.00, measured 65.00 (-7.7%, within 10%)" in told.detail
    assert "step, ms: predicted 500.00, measured 400.00 (+25.0%, outside of 15%)" in told.detail
    faster = {**result, "tokens_per_s": 29_000.0}
    ratio = gpu_check._ratio("FP8", gpu_check.Outcome(faster), gpu_check.Outcome(result))
    assert ratio.detail == "1.45 times (goal 1.4: reached)"
