"""A training step of megavlm on packed samples against Hugging Face Transformers on padded batches, on the CPU.

Both train a model of the same shape on the same samples, each in its own process and one at a time: they take turns,
round after round, and medians are reported. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import mixes  # noqa: E402  (imports neither torch nor Transformers)
from turns import Answer, in_turns  # noqa: E402

# Name in the table, system, batching.
SIDES = (
    ("megavlm, packed", "megavlm", "packed"),
    ("Transformers, random batches", "transformers", "random"),
    ("Transformers, grouped by length", "transformers", "grouped"),
)
PACKAGES = ("torch", "transformers", "megatron-core", "numpy")


class Worker:
    """A system in its own process."""

    def __init__(self, system: str, folder: Path, arguments: argparse.Namespace) -> None:
        threads = str(arguments.threads)
        where = str(arguments.samples if arguments.model == "qwen2_5_vl" else folder)
        words = [system, arguments.model, where, str(arguments.pack), threads]
        command = [sys.executable, str(HERE / "vs_worker.py"), *words]
        env = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "PYTHONPATH": str(HERE.parent),
            "TRANSFORMERS_VERBOSITY": "error",
        }
        self._errors = (folder / f"{system}.log").open("w+")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=env
        )

    def train(self, mix: str, batching: str, steps: int) -> Answer:
        """Train some steps and wait for what the worker says about them."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"mix": mix, "batching": batching, "steps": steps}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            sys.exit("the worker failed:\n" + self._errors.read()[-3000:])
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=60)
        self._errors.close()


@contextlib.contextmanager
def working(given: Mapping[str, tuple[str, Path, argparse.Namespace]]) -> Iterator[dict[str, Worker]]:
    """Have a worker of such arguments under each name, up to the end of the block."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(contextlib.closing(Worker(*one))) for name, one in given.items()}


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, list[Answer]]]:
    """Return the answers of every round, by mix and side."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for mix in arguments.mixes if arguments.model != "qwen2_5_vl" else ():
            mixes.save(mixes.make(mix, folder, arguments.samples), folder / f"{mix}.npz")
        with working({system: (system, folder, arguments) for system in ("megavlm", "transformers")}) as workers:
            return {mix: _rounds(mix, workers, arguments) for mix in arguments.mixes}


def _rounds(mix: str, workers: dict[str, Worker], arguments: argparse.Namespace) -> dict[str, list[Answer]]:
    # Without padding, grouping changes nothing.
    sides = SIDES[:2] if mix == "equal lengths" else SIDES
    for _, system, batching in sides:
        workers[system].train(mix, batching, 1)
    calls = {name: partial(workers[system].train, mix, batching, arguments.steps) for name, system, batching in sides}
    return in_turns(mix, calls, arguments.rounds)


def summarise(answers: list[Answer]) -> dict[str, float]:
    """Return the medians over the rounds of one side."""

    def median(key: str, per: str) -> float:
        return statistics.median(answer[key] / answer[per] for answer in answers)

    total = {key: sum(answer[key] for answer in answers) for key in ("tokens", "processed", "images")}
    return {
        "useful_per_s": median("supervised", "seconds"),
        "tokens_per_s": median("tokens", "seconds"),
        "us_per_processed": 1e6 * median("seconds", "processed"),
        "cpu_us_per_processed": 1e6 * median("cpu_seconds", "processed"),
        "padding": 1 - total["tokens"] / total["processed"],
        "images_per_1000_processed": 1000 * total["images"] / total["processed"],
        "loss": answers[-1]["loss"],
    }


def ratios(ours: list[Answer], theirs: list[Answer]) -> dict[str, float]:
    """Return the median over the rounds of ours / theirs; larger is better for megavlm."""

    def median(key: str, per: str) -> float:
        pairs = zip(ours, theirs, strict=True)
        return statistics.median((a[key] / a[per]) / (b[key] / b[per]) for a, b in pairs)

    return {
        name: median(key, per)
        for name, (key, per) in {
            "useful_per_s": ("supervised", "seconds"),
            "tokens_per_s": ("tokens", "seconds"),
            "processed_per_s": ("processed", "seconds"),
            "useful_per_cpu_s": ("supervised", "cpu_seconds"),
            "tokens_per_cpu_s": ("tokens", "cpu_seconds"),
            "processed_per_cpu_s": ("processed", "cpu_seconds"),
        }.items()
    }


def machine() -> dict[str, Any]:
    """Return what the numbers were taken on."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": names[0] if names else "unknown",
        "cores": os.cpu_count(),
        "load_average_before": os.getloadavg()[0],
        "python": sys.version.split()[0],
        "packages": {name: version(name) for name in PACKAGES},
    }


def table(result: dict[str, Any]) -> str:
    """Return the Markdown of a result."""
    settings, where = result["settings"], result["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in where["packages"].items())
    lines = [
        f"Machine: {where['cpu']}, {where['cores']} cores, {settings['threads']} thread(s) used, load "
        f"{where['load_average_before']:.1f} before the start. Python {where['python']}, {packages}. fp32.",
        f"Command: `{result['command']}` ({result['seconds']:.0f} s)",
        f"Parameters: {result['parameters']}. A pack is {settings['pack']} tokens; a padded batch has as many samples "
        f"as make one pack on average. {settings['rounds']} rounds of {settings['steps']} steps, in turns; medians.",
        "",
        "| mix | side | useful tokens/s | tokens/s | padding | us per processed token | the same, processor time "
        "| images per 1000 processed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for mix, sides in result["sides"].items():
        for name, s in sides.items():
            lines.append(
                f"| {mix} | {name} | {s['useful_per_s']:.0f} | {s['tokens_per_s']:.0f} | {s['padding']:.1%} | "
                f"{s['us_per_processed']:.0f} | {s['cpu_us_per_processed']:.0f} | "
                f"{s['images_per_1000_processed']:.1f} |"
            )
    lines += [
        "",
        "| mix | megavlm against | useful tokens/s | tokens/s | processed tokens/s | useful tokens/s of processor time "
        "| tokens/s of processor time | processed tokens/s of processor time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for mix, others in result["ratios"].items():
        for name, r in others.items():
            lines.append(f"| {mix} | {name} | " + " | ".join(f"{value:.2f}x" for value in r.values()) + " |")
    lines += ["", *(f"- **{mix}**: {result['mixes'][mix]}." for mix in result["sides"])]
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="threads of each system")
    parser.add_argument("--pack", type=int, default=2048, help="tokens of a pack")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of each mix")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of each side in a round")
    parser.add_argument("--samples", type=int, default=800, help="samples (quickstart: pictures) of each mix")
    parser.add_argument("--mixes", nargs="+", choices=[*mixes.DESCRIPTIONS], default=[*mixes.DESCRIPTIONS])
    parser.add_argument(
        "--model",
        choices=["llava", "phi", "paligemma", "qwen2_5_vl"],
        default="llava",
        help="whose shape (default llava): phi has attention and MLP side by side, paligemma sees prefixes both ways;"
        " qwen2_5_vl has a mix of its own",
    )
    parser.add_argument("--out", type=Path, help="write the numbers of every round as JSON")
    arguments = parser.parse_args()
    descriptions = dict(mixes.DESCRIPTIONS)
    if arguments.model == "qwen2_5_vl":
        from vs_native import DESCRIPTION

        if arguments.pack < 2048:
            parser.error("--pack: the longest samples of --model qwen2_5_vl take 2048 tokens; raise it")
        arguments.mixes, descriptions = ["native"], {"native": DESCRIPTION}
    where, start = machine(), time.perf_counter()
    rounds = measure(arguments)
    ours = SIDES[0][0]
    result = {
        "command": " ".join(["python", "benchmarks/vs_transformers.py", *sys.argv[1:]]),
        "machine": where,
        "settings": {key: value for key, value in vars(arguments).items() if key != "out"},
        "seconds": time.perf_counter() - start,
        "parameters": ", ".join(
            f"{name.split(',')[0]} {answers[0]['parameters']:,}"
            for name, answers in next(iter(rounds.values())).items()
            if not name.endswith("length")
        ),
        "sides": {mix: {name: summarise(answers) for name, answers in sides.items()} for mix, sides in rounds.items()},
        "ratios": {
            mix: {name: ratios(sides[ours], answers) for name, answers in sides.items() if name != ours}
            for mix, sides in rounds.items()
        },
        "rounds": rounds,
        "mixes": descriptions,
    }
    print(table(result))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
