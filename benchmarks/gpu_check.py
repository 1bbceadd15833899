"""Short checks on a GPU: does megavlm train there, with and without Transformer Engine, and how fast.

Every job runs in its own process, so that one failure does not hide the others. The table goes to the screen and to
``--out``. Exit code 0: all rows that could run are ok; 1: one failed; 2: there is nothing to check here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
JOB = Path(__file__).resolve().parent / "gpu_job.py"
NEEDED = ("torch", "megatron.core", "pydantic", "numpy", "PIL")

Job = dict[str, Any]


@dataclass
class Outcome:
    """What became of a job."""

    result: dict[str, Any] | None
    error: str = ""
    """The last line of the error."""
    log: str = ""
    """The end of its output."""


@dataclass
class Row:
    """A line of the table."""

    name: str
    status: str
    """ok, failed, or not run."""
    detail: str


class Runner:
    """Runs jobs, each once, and remembers what came out.

    Args:
        timeout: seconds that a job may take.
        on_cpu: hide the GPU from every job.
    """

    def __init__(self, timeout: float, *, on_cpu: bool) -> None:
        self.timeout, self.on_cpu = timeout, on_cpu
        self.outcomes: dict[str, Outcome] = {}
        self._known: dict[str, Outcome] = {}

    def __call__(self, name: str, job: Job) -> Outcome:
        """Run ``job`` (see gpu_job.py), or return what it gave before."""
        key = json.dumps(job)
        if key not in self._known:
            print(f"running: {name}", file=sys.stderr, flush=True)
            start = time.perf_counter()
            self._known[key] = self.outcomes[name] = self._run(job)
            print(f"  {time.perf_counter() - start:.0f} s {self.outcomes[name].error}", file=sys.stderr, flush=True)
        return self._known[key]

    def _run(self, job: Job) -> Outcome:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        # One process: neither a job that started us nor an odd host name may matter.
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            env.pop(name, None)
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
        env.setdefault("NCCL_SOCKET_IFNAME", "lo")
        env.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        if self.on_cpu or job.get("device") == "cpu":
            env["CUDA_VISIBLE_DEVICES"] = ""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "result.json"
            command = [sys.executable, str(JOB), json.dumps(job), str(out)]
            try:
                process = subprocess.run(
                    command,
                    env=env,
                    cwd=ROOT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    timeout=self.timeout,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                output = error.stdout or b""
                text = output.decode(errors="replace") if isinstance(output, bytes) else output
                return Outcome(None, f"took longer than {self.timeout:.0f} s", text[-4000:])
            if process.returncode == 0 and out.exists():
                return Outcome(json.loads(out.read_text()))
            return Outcome(None, _last_error(process.stdout, process.returncode), process.stdout[-4000:])


def _last_error(output: str, code: int) -> str:
    """Return the line that names the exception, or the last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception", "Exit"))]
    text = (named or lines or ["no output"])[-1][:200]
    return f"exit code {code}: {text}".replace("|", "/")


def environment() -> list[tuple[str, str]]:
    """Return what this machine has."""
    import torch

    rows = []
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        device = f"{torch.cuda.device_count()} x {p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}"
        rows = [("device", device), ("driver", _driver())]
        nccl = torch.cuda.nccl.version()
        rows.append(("CUDA of torch", str(torch.version.cuda)))
        rows.append(("cuDNN", str(torch.backends.cudnn.version())))
        rows.append(("NCCL", ".".join(map(str, nccl)) if isinstance(nccl, tuple) else str(nccl)))
    else:
        rows = [("device", "CPU (dry run)")]
    rows.append(("Python", platform.python_version()))
    for label, names in {
        "torch": ["torch"],
        "megatron-core": ["megatron-core"],
        "Transformer Engine": ["transformer-engine", "transformer-engine-cu13", "transformer-engine-cu12"],
        "flash-attn": ["flash-attn"],
        "DALI": ["nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110"],
    }.items():
        rows.append((label, _version(names)))
    return rows


def _version(names: list[str]) -> str:
    for name in names:
        try:
            return f"{version(name)} ({name})" if len(names) > 1 else version(name)
        except PackageNotFoundError:
            continue
    return "not installed"


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        return output.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown (no nvidia-smi)"


def installed(module: str) -> bool:
    """Whether ``module`` could be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def _training(size: str, precision: str, impl: str, *, dry: bool) -> Job:
    steps, warmup = (3, 1) if size == "small" or dry else (20, 5)
    size = "small" if dry else size
    return {"kind": "train", "size": size, "precision": precision, "impl": impl, "steps": steps, "warmup": warmup}


def _speed(result: dict[str, Any]) -> str:
    memory = "" if result["peak_gib"] is None else f", peak {result['peak_gib']:.2f} GiB"
    return (
        f"{result['parameters'] / 1e6:.0f} M parameters, step {result['step_ms']:.1f} ms, "
        f"{result['tokens_per_s']:,.0f} tokens/s, {result['images_per_step']:.0f} images per step{memory}, "
        f"loss {result['losses'][0]:.4f} to {result['losses'][-1]:.4f}"
    )


def _finite(result: dict[str, Any]) -> bool:
    values = [*result["losses"], *result["grad_norms"]]
    return all(value is not None and abs(value) < 1e6 for value in values)  # false for NaN


def _one(name: str, outcome: Outcome, describe: Callable[[dict[str, Any]], str]) -> Row:
    if outcome.result is None:
        return Row(name, "failed", outcome.error)
    return Row(name, "ok" if _finite(outcome.result) else "failed", describe(outcome.result))


def _compared(name: str, ours: Outcome, theirs: Outcome, limit: float, steps: int | None = None) -> Row:
    """A row that holds losses and gradient norms of two runs from the same weights against each other.

    Only the first ``steps`` count: bf16 weights do not move for some steps where fp32 ones do, since the first
    updates are smaller than what their rounding hides.
    """
    for outcome in (ours, theirs):
        if outcome.result is None:
            return Row(name, "failed", outcome.error)
    assert ours.result is not None and theirs.result is not None
    apart = {}
    for key in ("losses", "grad_norms"):
        pairs = list(zip(ours.result[key], theirs.result[key], strict=True))[:steps]
        apart[key] = max(abs(a - b) / abs(b) for a, b in pairs)
    # A norm is less exact than a loss, and shows more: it reaches every weight.
    ok = _finite(ours.result) and _finite(theirs.result)
    ok = ok and apart["losses"] <= limit and apart["grad_norms"] <= 10 * limit
    text = (
        f"{len(pairs)} step(s), relative difference of losses up to {apart['losses']:.1e} (limit "
        f"{limit:.0e}), of gradient norms {apart['grad_norms']:.1e} (limit {10 * limit:.0e}), "
        f"first loss {ours.result['losses'][0]:.4f}"
    )
    return Row(name, "ok" if ok else "failed", text)


def check(run: Runner, *, dry: bool) -> list[Row]:
    """Run everything; return the table."""
    fp32 = run("small model, fp32, torch layers", _training("small", "fp32", "torch", dry=dry))
    cpu = run("small model, fp32, CPU", {**_training("small", "fp32", "torch", dry=dry), "device": "cpu"})
    bf16 = run("small model, bf16, torch layers", _training("small", "bf16", "torch", dry=dry))
    rows = [
        _compared("fp32, torch layers: this device against the CPU", fp32, cpu, 1e-4),
        _compared("bf16 against fp32, torch layers", bf16, fp32, 5e-3, steps=1),
    ]
    engine = "small model, bf16, Transformer Engine"
    name = "bf16, Transformer Engine against torch layers"
    missing = ""
    if dry:
        missing = "needs a CUDA device"
    elif not installed("transformer_engine"):
        missing = "transformer-engine is not installed"
    if missing:
        rows.append(Row(name, "not run", missing))
    else:
        rows.append(_compared(name, run(engine, _training("small", "bf16", "transformer_engine", dry=dry)), bf16, 5e-3))
    speed = "bf16 step, 448 px, packs of 2048" if not dry else "bf16 step, small model"
    plain = run(f"{speed}, torch layers", _training("mid", "bf16", "torch", dry=dry))
    rows.append(_one(f"{speed}, torch layers", plain, _speed))
    if missing:
        rows.append(Row(f"{speed}, Transformer Engine", "not run", missing))
    else:
        fast = run(f"{speed}, Transformer Engine", _training("mid", "bf16", "transformer_engine", dry=dry))
        rows.append(_one(f"{speed}, Transformer Engine", fast, _speed))
        rows.append(_compared(f"{speed}, Transformer Engine against torch layers", fast, plain, 2e-2))
    rows.append(_dali(run, dry=dry))
    return rows


def _dali(run: Runner, *, dry: bool) -> Row:
    name = "DALI decodes JPEGs as PIL does"
    if not installed("nvidia.dali"):
        return Row(name, "not run", "nvidia-dali is not installed")
    outcome = run("DALI", {"kind": "dali", "images": 16 if dry else 256, "size": 64 if dry else 448})
    if outcome.result is None:
        return Row(name, "failed", outcome.error)
    r = outcome.result
    ok = r["failed"] == 0 and r["mean_difference"] < 1.0
    text = (
        f"on {r['device']}: {r['images_per_s']:,.0f} images/s of 640 x 480, mean difference "
        f"{r['mean_difference']:.2f} of 255, largest {r['max_difference']:.0f}, {r['failed']} failed"
    )
    return Row(name, "ok" if ok else "failed", text)


def markdown(rows: list[Row], machine: list[tuple[str, str]], run: Runner, seconds: float) -> str:
    """Return the report."""
    lines = ["# GPU check", "", f"`make gpu-check`, {time.strftime('%Y-%m-%d')}, {seconds:.0f} s.", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in machine)]
    lines += ["", "| check | result | |", "|---|---|---|"]
    lines += [f"| {row.name} | {row.status} | {row.detail} |" for row in rows]
    for name, outcome in run.outcomes.items():
        if outcome.result is None:
            lines += ["", f"## Output of the failed job: {name}", "", "```", outcome.log.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Check, print and write the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "gpu.md", help="Markdown file to write")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that one job may take")
    parser.add_argument(
        "--dry-run-cpu", action="store_true", help="the same jobs, small, on the CPU: tests this script"
    )
    arguments = parser.parse_args()
    absent = [name for name in NEEDED if not installed(name)]
    if absent:
        print(f"gpu-check: {sys.executable} has no {', '.join(absent)}; install them first", file=sys.stderr)
        return 2
    import torch

    if not arguments.dry_run_cpu and not torch.cuda.is_available():
        print("gpu-check: torch finds no CUDA device on this machine, so there is nothing to check", file=sys.stderr)
        return 2
    start = time.perf_counter()
    run = Runner(arguments.timeout, on_cpu=arguments.dry_run_cpu)
    rows = check(run, dry=arguments.dry_run_cpu)
    report = markdown(rows, environment(), run, time.perf_counter() - start)
    print(report, end="")
    arguments.out.write_text(report, encoding="utf-8")
    return 1 if any(row.status == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
