"""Runs the jobs of ``gpu_check``, alone or several in a process and all within a limit, and writes what came out."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
JOB = Path(__file__).resolve().parent / "gpu_job.py"
LEAST_SECONDS = 15.0
"""A job is not started with less time than this left."""
LATE = "took longer than"

Job = dict[str, Any]


@dataclass
class Outcome:
    """What became of a job."""

    result: dict[str, Any] | None
    error: str = ""
    """The last line of the error."""
    log: str = ""
    """The end of its output."""
    skipped: bool = False
    """It was not run, as time was up or the machine lacks something."""


@dataclass
class Row:
    """A line of the table."""

    name: str
    status: str
    """ok, failed, or not run."""
    detail: str
    figures: dict[str, Any] = field(default_factory=dict)
    """The numbers of the line, for the JSON file."""


class Runner:
    """Runs jobs, each once, and remembers what came out.

    Args:
        timeout: seconds that a job may take.
        on_cpu: hide the GPU from every job.
        limit: seconds that all jobs together may take; what is left over is not run.
    """

    def __init__(self, timeout: float, *, on_cpu: bool, limit: float = 460.0) -> None:
        self.timeout, self.on_cpu = timeout, on_cpu
        self.outcomes: dict[str, Outcome] = {}
        self._deadline = time.monotonic() + limit
        self._known: dict[str, Outcome] = {}
        self._groups: list[list[str]] = []
        self._at_work: _Several | None = None

    def together(self, jobs: Sequence[Job]) -> None:
        """Do these in one process, in this order, when the first of them is asked for: importing is most of a job.

        Each is there when it is done. One that fails behind others is tried again in a process of its own, and one that
        hangs or ends the process is failed and the rest goes on in another.
        """
        self._groups.append([json.dumps(job) for job in jobs])

    def close(self) -> None:
        """End what is at work."""
        if self._at_work is not None:
            self._at_work.close()
            self._at_work = None

    def __call__(self, name: str, job: Job) -> Outcome:
        """Run ``job`` (see gpu_job.py), or return what it gave before."""
        key = json.dumps(job)
        if key not in self._known:
            left = self._deadline - time.monotonic()
            if left < LEAST_SECONDS:
                outcome = Outcome(None, "the time for the whole check is up (--limit)", skipped=True)
            else:
                print(f"running: {name}", file=sys.stderr, flush=True)
                start = time.perf_counter()
                group = next((one for one in self._groups if key in one), None)
                if group is None:
                    outcome = self._run(job, min(self.timeout, left))
                else:
                    outcome = self._from_group(key, group)
                print(f"  {time.perf_counter() - start:.0f} s {outcome.error}", file=sys.stderr, flush=True)
            self._known[key] = self.outcomes[name] = outcome
        return self._known[key]

    def _from_group(self, key: str, group: list[str]) -> Outcome:
        """Return what a job of a group gives; start the group's process, or another for the rest, where it must be."""
        if self._at_work is None or not self._at_work.gives(key):
            self.close()
            rest = [one for one in group[group.index(key) :] if one not in self._known]
            self._at_work = _Several(rest, self._environment({}))
        several = self._at_work
        outcome = several.wait(key, min(self.timeout, self._deadline - time.monotonic()))
        late = outcome.error.startswith(LATE)
        if outcome.result is None and not outcome.skipped and not late and several.keys[0] != key:
            self.close()
            left = self._deadline - time.monotonic()
            if left > LEAST_SECONDS:
                print(f"  {outcome.error}; once more, in a process of its own", file=sys.stderr, flush=True)
                return self._run(json.loads(key), min(self.timeout, left))
        return outcome

    def _environment(self, job: Job) -> dict[str, str]:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        # One process: neither a job that started us nor an odd host name may matter.
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            env.pop(name, None)
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
        env.setdefault("NCCL_SOCKET_IFNAME", "lo")
        env.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        if self.on_cpu or job.get("device") == "cpu":
            env["CUDA_VISIBLE_DEVICES"] = ""
        return env

    def _run(self, job: Job, timeout: float) -> Outcome:
        env = self._environment(job)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "result.json"
            start = [sys.executable]
            if job.get("ranks", 1) > 1:
                start += ["-m", "torch.distributed.run", f"--nproc-per-node={job['ranks']}", "--standalone"]
            command = [*start, str(JOB), json.dumps(job), str(out)]
            try:
                process = subprocess.run(
                    command,
                    env=env,
                    cwd=ROOT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    timeout=timeout,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                output = error.stdout or b""
                text = output.decode(errors="replace") if isinstance(output, bytes) else output
                return Outcome(None, f"{LATE} {timeout:.0f} s", text[-4000:])
            if process.returncode == 0 and out.exists():
                result = json.loads(out.read_text())
                if "missing" in result:
                    return Outcome(None, result["missing"].replace("|", "/"), skipped=True)
                return Outcome(result)
            return Outcome(None, _last_error(process.stdout, process.returncode), process.stdout[-4000:])


class _Several:
    """A process that does several jobs.

    Args:
        keys: the jobs, as JSON, in their order.
        env: of the process.
    """

    def __init__(self, keys: list[str], env: dict[str, str]) -> None:
        self.keys = keys
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "log"
        job = json.dumps({"kind": "several", "jobs": [json.loads(key) for key in keys]})
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(JOB), job, self._folder.name],
                env=env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def wait(self, key: str, timeout: float) -> Outcome:
        """Return what a job gives; where it takes too long, the process is ended."""
        written = self._written(key)
        end = time.monotonic() + timeout
        while not written.exists():
            code = self._process.poll()
            if code is not None and not written.exists():
                return Outcome(None, _last_error(self._output(), code), self._output()[-4000:])
            if time.monotonic() > end:
                self._process.kill()
                self._process.wait()
                return Outcome(None, f"{LATE} {timeout:.0f} s", self._output()[-4000:])
            time.sleep(0.05)
        result = json.loads(written.read_text())
        if "missing" in result:
            return Outcome(None, result["missing"].replace("|", "/"), skipped=True)
        if "error" in result:
            return Outcome(None, result["error"].replace("|", "/"), result["log"])
        return Outcome(result)

    def gives(self, key: str) -> bool:
        """Whether what a job gives is there, or may yet come."""
        if key not in self.keys:
            return False
        return self._process.poll() is None or self._written(key).exists()

    def _written(self, key: str) -> Path:
        return Path(self._folder.name) / f"{self.keys.index(key)}.json"

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    def _output(self) -> str:
        return self._log.read_text(errors="replace")


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
        "Apex": ["apex"],
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


def markdown(rows: list[Row], machine: list[tuple[str, str]], run: Runner, seconds: float) -> str:
    """Return the report."""
    lines = ["# GPU check", "", f"`make gpu-check`, {time.strftime('%Y-%m-%d')}, {seconds:.0f} s.", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in machine)]
    lines += ["", "| check | result | |", "|---|---|---|"]
    lines += [f"| {row.name} | {row.status} | {row.detail} |" for row in rows]
    for name, outcome in run.outcomes.items():
        if outcome.result is None and not outcome.skipped:
            lines += ["", f"## Output of the failed job: {name}", "", "```", outcome.log.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def as_json(rows: list[Row], machine: list[tuple[str, str]], run: Runner, seconds: float) -> str:
    """Return the same as JSON, with every job's own result."""
    tree = {
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(seconds, 1),
        "machine": dict(machine),
        "rows": [asdict(row) for row in rows],
        "rates": next((row.figures for row in rows if row.name.startswith("rates of ")), {}),
        "jobs": {name: outcome.result or {"error": outcome.error} for name, outcome in run.outcomes.items()},
    }
    return json.dumps(tree, indent=1) + "\n"
