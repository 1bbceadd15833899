"""A training step of a mixture of experts in megavlm against Transformers' Qwen3-MoE by both of its paths, on one core.

All sides train the same weights, whose routers prefer some experts (``moe_worker.py``), on the same samples, each in
its own process and one at a time: they take turns, round after round, and medians are reported. See
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import mixes  # noqa: E402  (imports neither torch nor Transformers)
from turns import Answer, in_turns  # noqa: E402
from vs_transformers import Worker, machine, ratios, summarise, working  # noqa: E402

OURS = "megavlm"
# Name in the table: system and shape of vs_worker.
SIDES = {
    OURS: ("megavlm", "qwen3_moe"),
    "Transformers, grouped_mm": ("transformers", "qwen3_moe"),
    "Transformers, eager": ("transformers", "qwen3_moe_eager"),
}
GOALS = {"Transformers, grouped_mm": 1.0, "Transformers, eager": 1.5}
"""Tokens per second of megavlm over theirs, at equal lengths."""
MIXES = {
    "equal lengths": "random tokens, every sample 128 long: no padding anywhere, and the same batches on all sides",
    "log-normal lengths": "random tokens, log-normal lengths (median 86, sigma 0.6): packs here, batches in random "
    "order and padded there",
}


def make(name: str, count: int) -> list[mixes.Sample]:
    """Return text-only samples, whose last 60 % are supervised."""
    rng = np.random.default_rng(1)
    lengths = np.full(count, 128)
    if name != "equal lengths":
        lengths = np.clip(rng.lognormal(np.log(86), 0.6, count), 8, 512).astype(np.int64)
    return [mixes._random_sample(rng, images=0, text=int(length)) for length in lengths]


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, list[Answer]]]:
    """Return the answers of every round, by mix and side; the first of them is of the step that warms up."""
    with tempfile.TemporaryDirectory() as name:
        given = {}
        for side, (system, shape) in SIDES.items():
            folder = Path(name) / side
            folder.mkdir()
            for mix in arguments.mixes:
                mixes.save(make(mix, arguments.samples), folder / f"{mix}.npz")
            given[side] = system, folder, argparse.Namespace(**{**vars(arguments), "model": shape})
        with working(given) as workers:
            return {mix: _rounds(mix, workers, arguments) for mix in arguments.mixes}


def _rounds(mix: str, workers: dict[str, Worker], arguments: argparse.Namespace) -> dict[str, list[Answer]]:
    def batching(side: str) -> str:
        if mix == "equal lengths":
            return "in order"
        return "packed" if side == OURS else "random"

    first = {side: [worker.train(mix, batching(side), 1)] for side, worker in workers.items()}
    calls = {side: partial(worker.train, mix, batching(side), arguments.steps) for side, worker in workers.items()}
    found = in_turns(mix, calls, arguments.rounds)
    return {side: first[side] + found[side] for side in workers}


def check_same(sides: dict[str, list[Answer]]) -> dict[str, Any]:
    """Return what shows that all sides do the same work, of the mix whose batches are the same; or end.

    In the first step nobody has moved a weight yet: losses are equal, and so are the tokens of each expert but for
    ties that rounding decides.
    """
    ours = sides[OURS][0]
    total = sum(map(sum, ours["loads"]))
    apart, moved = 0.0, 0.0
    for answers in sides.values():
        apart = max(apart, abs(answers[0]["loss"] / ours["loss"] - 1))
        theirs = answers[0]["loads"]
        pairs = [(a, b) for x, y in zip(ours["loads"], theirs, strict=True) for a, b in zip(x, y, strict=True)]
        moved = max(moved, sum(abs(a - b) for a, b in pairs) / total)
    if apart > 1e-4 or moved > 1e-3:
        sys.exit(f"the sides do not train the same model: losses differ by {apart:.2g}, loads by {moved:.2g}")
    return {"losses_apart": apart, "loads_apart": moved, "last_losses": {n: a[-1]["loss"] for n, a in sides.items()}}


def shares(loads: list[list[int]]) -> dict[str, float]:
    """Return how skewed loads are, the mean over the layers: of an equal share, and of all tokens."""
    rows = [sorted(row, reverse=True) for row in loads]
    count = len(rows[0])

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return {
        "largest": mean([row[0] * count / sum(row) for row in rows]),
        "median": mean([row[count // 2] * count / sum(row) for row in rows]),
        "smallest": mean([row[-1] * count / sum(row) for row in rows]),
        "top_eighth": mean([sum(row[: count // 8]) / sum(row) for row in rows]),
    }


def table(result: dict[str, Any]) -> str:
    """Return the Markdown of a result."""
    settings, where, load = result["settings"], result["machine"], result["loads"]
    packages = ", ".join(f"{name} {number}" for name, number in where["packages"].items())
    lines = [
        f"Machine: {where['cpu']}, {where['cores']} cores, {settings['threads']} thread(s) used, load "
        f"{where['load_average_before']:.1f} before the start. Python {where['python']}, {packages}. fp32.",
        f"Command: `{result['command']}` ({result['seconds']:.0f} s)",
        f"Parameters: {result['parameters']:,}. A pack is {settings['pack']} tokens. {settings['rounds']} rounds of "
        f"{settings['steps']} steps, in turns; medians.",
        f"Loads, of an equal share: largest {load['largest']:.1f}, median {load['median']:.2f}, smallest "
        f"{load['smallest']:.2f}; an eighth of the experts takes {load['top_eighth']:.0%} of the tokens.",
    ]
    if "same" in result:
        lines.append(f"First losses differ by {result['same']['losses_apart']:.1e} at most, loads by "
                     f"{result['same']['loads_apart']:.1e}.")  # fmt: skip
    lines += ["", "| mix | side | tokens/s | us per processed token | the same, processor time | padding |"]
    lines.append("|---|---|---|---|---|---|")
    for mix, sides in result["sides"].items():
        for name, s in sides.items():
            lines.append(
                f"| {mix} | {name} | {s['tokens_per_s']:.0f} | {s['us_per_processed']:.0f} | "
                f"{s['cpu_us_per_processed']:.0f} | {s['padding']:.1%} |"
            )
    lines += ["", "| mix | megavlm against | tokens/s | processed tokens/s | tokens/s of processor time | goal |"]
    lines.append("|---|---|---|---|---|---|")
    for mix, others in result["ratios"].items():
        for name, r in others.items():
            goal = f"{GOALS[name]:.1f}x" if mix == "equal lengths" else ""
            lines.append(
                f"| {mix} | {name} | {r['tokens_per_s']:.2f}x | {r['processed_per_s']:.2f}x | "
                f"{r['tokens_per_cpu_s']:.2f}x | {goal} |"
            )
    return "\n".join([*lines, "", *(f"- **{mix}**: {MIXES[mix]}." for mix in result["sides"])])


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="threads of each system")
    parser.add_argument("--pack", type=int, default=2048, help="tokens of a pack; a multiple of 128")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of each mix")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of each side in a round")
    parser.add_argument("--samples", type=int, default=800, help="samples of each mix")
    parser.add_argument("--mixes", nargs="+", choices=[*MIXES], default=[*MIXES])
    parser.add_argument("--out", type=Path, help="write the numbers of every round as JSON")
    arguments = parser.parse_args()
    if arguments.pack % 128:
        parser.error("--pack: samples of 128 tokens do not fill it; take a multiple of 128")
    where, start = machine(), time.perf_counter()
    found = measure(arguments)
    rounds = {mix: {side: answers[1:] for side, answers in sides.items()} for mix, sides in found.items()}
    first = next(iter(found.values()))[OURS][0]
    result = {
        "command": " ".join(["python", "benchmarks/moe.py", *sys.argv[1:]]),
        "machine": where,
        "settings": {key: value for key, value in vars(arguments).items() if key != "out"},
        "seconds": time.perf_counter() - start,
        "parameters": first["parameters"],
        "loads": shares(first["loads"]),
        "sides": {mix: {name: summarise(answers) for name, answers in sides.items()} for mix, sides in rounds.items()},
        "ratios": {
            mix: {name: ratios(sides[OURS], answers) for name, answers in sides.items() if name != OURS}
            for mix, sides in rounds.items()
        },
        "rounds": found,
    }
    if "equal lengths" in found:
        result["same"] = check_same(found["equal lengths"])
    print(table(result))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
