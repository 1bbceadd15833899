"""Short checks on a GPU: does megavlm train there, in which precision, with which kernels, and how fast.

Every job runs in its own process, so that one failure does not hide the others; all together end within ``--limit``.
The table goes to the screen and to ``--out``, and the same with all figures to a JSON file beside it. Exit code 0: all
rows that could run are ok; 1: one failed; 2: there is nothing to check here.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_runner import ROOT, Job, Outcome, Row, Runner, as_json, environment, installed, markdown

NEEDED = ("torch", "megatron.core", "pydantic", "numpy", "PIL")
SCALINGS = ("tensorwise", "delayed", "blockwise", "mxfp8")
GOAL_MFU, GOAL_FP8 = 0.50, 1.4
MEMORY_WITHIN, TIME_WITHIN = 0.10, 0.15
ATTENTION_LIMIT = 0.02
"""Of bf16 attention against fp32, relative to the largest value: some three of its roundings."""
ENGINE = "transformer_engine"


def _training(size: str, precision: str, impl: str, *, dry: bool, **more: Any) -> Job:
    steps, warmup = (3, 1) if size == "small" or dry else (16, 6)
    size = "small" if dry else size
    return {
        "kind": "train",
        "size": size,
        "precision": precision,
        "impl": impl,
        "steps": steps,
        "warmup": warmup,
        **more,
    }


def _speed(result: dict[str, Any]) -> str:
    parts = [
        f"{result['parameters'] / 1e6:,.0f} M parameters, {result['layers']} language layers",
        f"step {result['step_ms']:.1f} ms",
        f"{result['tokens_per_s']:,.0f} tokens/s",
        f"{result['images_per_s']:,.1f} images/s",
        f"{result['model_tflops']:.1f} model TFLOP/s",
    ]
    if result["mfu"] is not None:
        parts.append(f"MFU {result['mfu']:.1%} of the bf16 peak")
    if result["mfu_fp8_peak"] is not None:
        parts.append(f"{result['mfu_fp8_peak']:.1%} of the FP8 peak")
    return ", ".join([*parts, f"loss {result['losses'][0]:.4f} to {result['losses'][-1]:.4f}"])


def _finite(result: dict[str, Any]) -> bool:
    values = [*result["losses"], *result["grad_norms"]]
    return all(value is not None and abs(value) < 1e6 for value in values)  # false for NaN


def _unless_run(name: str, *outcomes: Outcome) -> Row | None:
    """Return the row that says why there is no result, or None."""
    for outcome in outcomes:
        if outcome.result is None:
            return Row(name, "not run" if outcome.skipped else "failed", outcome.error)
    return None


def _one(name: str, outcome: Outcome, describe: Callable[[dict[str, Any]], str]) -> Row:
    if outcome.result is None:
        return _unless_run(name, outcome) or Row(name, "failed", "")
    return Row(name, "ok" if _finite(outcome.result) else "failed", describe(outcome.result), outcome.result)


def _compared(name: str, ours: Outcome, theirs: Outcome, limit: float, steps: int | None = None) -> Row:
    """A row that holds losses and gradient norms of two runs from the same weights against each other.

    Only the first ``steps`` count: bf16 weights do not move for some steps where fp32 ones do, since the first
    updates are smaller than what their rounding hides.
    """
    missing = _unless_run(name, ours, theirs)
    if missing is not None:
        return missing
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
    return Row(name, "ok" if ok else "failed", text, apart)


def _attention(name: str, outcome: Outcome) -> Row:
    """A row that holds every case of attention against fp32."""
    if outcome.result is None:
        return _unless_run(name, outcome) or Row(name, "failed", "")
    cases = outcome.result["cases"]
    worst = max(max(case.values()) for case in cases.values())
    told = ", ".join(f"{case} {max(values.values()):.1e}" for case, values in cases.items())
    status = "ok" if worst <= ATTENTION_LIMIT else "failed"  # failed for NaN
    return Row(name, status, f"relative difference of outputs and gradients: {told} (limit {ATTENTION_LIMIT})", cases)


def parity(run: Runner, missing: str, *, dry: bool) -> list[Row]:
    """Hold this device's numbers against the CPU's, and its kernels and precisions against each other."""
    fp32 = run("small model, fp32, torch layers", _training("small", "fp32", "torch", dry=dry))
    cpu = run("small model, fp32, CPU", {**_training("small", "fp32", "torch", dry=dry), "device": "cpu"})
    bf16 = run("small model, bf16, torch layers", _training("small", "bf16", "torch", dry=dry))
    rows = [
        _compared("fp32, torch layers: this device against the CPU", fp32, cpu, 1e-4),
        _compared("bf16 against fp32, torch layers", bf16, fp32, 5e-3, steps=1),
        _attention("bf16 attention, torch", run("attention, torch", {"kind": "attention", "impl": "torch"})),
    ]
    names = ["bf16 attention, Transformer Engine", "bf16, Transformer Engine against torch layers"]
    names += [f"FP8 ({scaling}) against bf16, Transformer Engine" for scaling in SCALINGS]
    if missing:
        return [*rows, *(Row(name, "not run", missing) for name in names)]
    rows.append(_attention(names[0], run("attention, Transformer Engine", {"kind": "attention", "impl": ENGINE})))
    plain = run("small model, bf16, Transformer Engine", _training("small", "bf16", ENGINE, dry=dry))
    rows.append(_compared(names[1], plain, bf16, 5e-3))
    for name, scaling in zip(names[2:], SCALINGS, strict=True):
        # With delayed scaling the first step computes at scale 1; two steps of all are compared.
        job = _training("small", "bf16", ENGINE, dry=dry, engine={"fp8": "hybrid", "fp8_recipe": scaling})
        rows.append(_compared(name, run(f"small model, FP8 {scaling}", job), plain, 5e-2, steps=2))
    return rows


def slice_layers(memory_gib: float) -> int:
    """Return how many of the 14B's 40 language layers fit beside the frozen tower, with their optimizer.

    A layer has 315 M parameters: 18 bytes each in training (bf16 weight, fp32 gradient, master and two moments), and 2
    for FP8 copies. Tower (frozen), connector, vocabulary of 32768, logits and CUDA take some 17 GiB.
    """
    return max(0, min(8, int((0.9 * memory_gib - 17.0) / 6.2)))


def speed(run: Runner, missing: str, memory_gib: float, *, dry: bool) -> list[Row]:
    """Time one GPU's slice of the 14B in BF16 and FP8, and hold memory and time against the planner."""
    layers = 4 if dry else slice_layers(memory_gib)
    label = "14B slice" if not dry else "small model"
    names = {kind: f"{label}, {kind}" for kind in ("BF16, torch layers", "BF16", "FP8 (tensorwise)", "FP8 (delayed)")}
    if layers == 0:
        return [
            Row(name, "not run", f"needs some 26 GiB of GPU memory, here are {memory_gib:.0f}")
            for name in names.values()
        ]
    own = {"layers": layers, "freeze_vision": True, "own_weights": True}
    engines: dict[str, dict[str, Any]] = {
        "BF16": {},
        "FP8 (tensorwise)": {"fp8": "hybrid", "fp8_recipe": "tensorwise", "first_last_layers_bf16": False},
        "FP8 (delayed)": {"fp8": "hybrid", "fp8_recipe": "delayed"},
    }
    rows, done = [], {}
    for kind, engine in engines.items():
        if missing:
            rows.append(Row(names[kind], "not run", missing))
            continue
        done[kind] = run(names[kind], _training("slice", "bf16", ENGINE, dry=dry, engine=engine, **own))
        rows += _timed(names[kind], done[kind])
    torch_name = names["BF16, torch layers"]
    rows += _timed(torch_name, run(torch_name, _training("slice", "bf16", "torch", dry=dry, **own)))
    if "BF16" in done:
        rows.append(_ratio("FP8 against BF16, tokens/s", done["FP8 (tensorwise)"], done["BF16"]))
    return rows


def _timed(name: str, outcome: Outcome) -> list[Row]:
    """The rows of a timed job: its speed, and what the planner had said."""
    row = _one(name, outcome, _speed)
    result = outcome.result
    if result is None:
        return [row]
    if result["mfu"] is not None:
        row.detail += f"; goal {GOAL_MFU:.0%} MFU: {'reached' if result['mfu'] >= GOAL_MFU else 'missed'}"
    told = [
        _against("memory, GiB", result["predicted_gib"], result["peak_gib"], MEMORY_WITHIN),
        _against("step, ms", result["predicted_step_ms"], result["step_ms"], TIME_WITHIN),
    ]
    return [row, Row(f"{name}: the planner's prediction", "ok", "; ".join(told))]


def _against(what: str, predicted: float | None, measured: float | None, within: float) -> str:
    if predicted is None or measured is None:
        words = [f"{value:.2f}" if value is not None else "unknown here" for value in (predicted, measured)]
        return f"{what}: predicted {words[0]}, measured {words[1]}"
    off = predicted / measured - 1
    verdict = "within" if abs(off) <= within else "outside of"
    return f"{what}: predicted {predicted:.2f}, measured {measured:.2f} ({off:+.1%}, {verdict} {within:.0%})"


def _ratio(name: str, fast: Outcome, plain: Outcome) -> Row:
    missing = _unless_run(name, fast, plain)
    if missing is not None:
        return missing
    assert fast.result is not None and plain.result is not None
    ratio = fast.result["tokens_per_s"] / plain.result["tokens_per_s"]
    verdict = "reached" if ratio >= GOAL_FP8 else "missed"
    return Row(name, "ok", f"{ratio:.2f} times (goal {GOAL_FP8}: {verdict})", {"ratio": ratio})


def dali(run: Runner, *, dry: bool) -> Row:
    """Hold DALI's pictures against PIL's."""
    name = "DALI decodes JPEGs as PIL does"
    if not installed("nvidia.dali"):
        return Row(name, "not run", "nvidia-dali is not installed")
    outcome = run("DALI", {"kind": "dali", "images": 16 if dry else 256, "size": 64 if dry else 448})
    if outcome.result is None:
        return _unless_run(name, outcome) or Row(name, "failed", "")
    r = outcome.result
    ok = r["failed"] == 0 and r["mean_difference"] < 1.0
    text = (
        f"on {r['device']}: {r['images_per_s']:,.0f} images/s of 640 x 480, mean difference "
        f"{r['mean_difference']:.2f} of 255, largest {r['max_difference']:.0f}, {r['failed']} failed"
    )
    return Row(name, "ok" if ok else "failed", text, r)


def check(run: Runner, *, dry: bool) -> list[Row]:
    """Run everything; return the table."""
    missing, memory_gib = "", 0.0
    if dry:
        missing = "needs a CUDA device"
    else:
        import torch

        memory_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
        if not installed(ENGINE):
            missing = "transformer-engine is not installed"
    # What may run out of time comes last.
    rows = [*parity(run, missing, dry=dry), dali(run, dry=dry)]
    return [*rows, *speed(run, missing, memory_gib, dry=dry)]


def main() -> int:
    """Check, print and write the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "gpu.md",
        help="Markdown file to write; the figures go to a .json beside it",
    )
    parser.add_argument("--timeout", type=float, default=120, help="seconds that one job may take (default 120)")
    parser.add_argument("--limit", type=float, default=460, help="seconds that all jobs may take (default 460)")
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
    run = Runner(arguments.timeout, on_cpu=arguments.dry_run_cpu, limit=arguments.limit)
    rows = check(run, dry=arguments.dry_run_cpu)
    machine, seconds = environment(), time.perf_counter() - start
    report = markdown(rows, machine, run, seconds)
    print(report, end="")
    arguments.out.write_text(report, encoding="utf-8")
    arguments.out.with_suffix(".json").write_text(as_json(rows, machine, run, seconds), encoding="utf-8")
    return 1 if any(row.status == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
