"""Short checks on a GPU: does megavlm train there, in which precision, with which kernels, and how fast.

Jobs of a part share a process, since importing and compiling is most of one; a job that fails there is tried again in a
process of its own, so that no failure hides another. All together end within ``--limit``, in the order of their worth.
The table goes to the screen and to ``--out``, and the same with all figures to a JSON file beside it. Exit code 0: all
rows that could run are ok; 1: one failed; 2: there is nothing to check here.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu_families import SLICES
from gpu_rows import _attention, _compared, _one, _scan, _speed, _unless_run
from gpu_runner import ROOT, Job, Outcome, Row, Runner, as_json, environment, installed, markdown

NEEDED = ("torch", "megatron.core", "pydantic", "numpy", "PIL")
SCALINGS = ("tensorwise", "delayed", "blockwise", "mxfp8")
GOAL_MFU, GOAL_MFU_TORCH, GOAL_FP8, GOAL_STALL = 0.50, 0.45, 1.4, 1.5
UNSEEN_WITHIN = 0.03
MEMORY_WITHIN, TIME_WITHIN = 0.10, 0.15
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


def parity(run: Runner, *, dry: bool) -> Iterator[Row]:
    """Hold this device's numbers against the CPU's, and bf16 against fp32; torch layers."""
    cpu = run("small model, fp32, CPU", {**_training("small", "fp32", "torch", dry=dry), "device": "cpu"})
    fp32 = run("small model, fp32, torch layers", _training("small", "fp32", "torch", dry=dry))
    yield _compared("fp32, torch layers: this device against the CPU", fp32, cpu, 1e-4)
    bf16 = run(BF16, _training("small", "bf16", "torch", dry=dry))
    yield _compared("bf16 against fp32, torch layers", bf16, fp32, 5e-3, steps=1)


BF16 = "small model, bf16, torch layers"


def engine(run: Runner, missing: str, *, dry: bool) -> Iterator[Row]:
    """Hold Transformer Engine's attention, layers and FP8 against torch's bf16."""
    names = ["bf16 attention, Transformer Engine", "bf16, Transformer Engine against torch layers"]
    names += [f"FP8 ({scaling}) against bf16, Transformer Engine" for scaling in SCALINGS]
    if missing:
        yield from (Row(name, "not run", missing) for name in names)
        return
    yield _attention(names[0], run("attention, Transformer Engine", {"kind": "attention", "impl": ENGINE}))
    bf16 = run(BF16, _training("small", "bf16", "torch", dry=dry))
    plain = run("small model, bf16, Transformer Engine", _training("small", "bf16", ENGINE, dry=dry))
    yield _compared(names[1], plain, bf16, 5e-3)
    for name, scaling in zip(names[2:], SCALINGS, strict=True):
        # With delayed scaling the first step computes at scale 1; two steps of all are compared.
        job = _training("small", "bf16", ENGINE, dry=dry, engine={"fp8": "hybrid", "fp8_recipe": scaling})
        yield _compared(name, run(f"small model, FP8 {scaling}", job), plain, 5e-2, steps=2)


def families(run: Runner, memory_gib: float, *, dry: bool) -> Iterator[Row]:
    """Time slices of families of other kinds: native pictures, experts, cross-attention, two kinds of weights, prefix.

    And Mamba, with its scan by torch held against its own kernel where that is installed.
    """
    jobs = family_jobs(memory_gib, dry=dry)
    for kind, one in SLICES.items():
        if kind not in jobs:
            yield Row(one.title, "not run", f"does not fit into {memory_gib:.0f} GiB of GPU memory")
            continue
        yield from _timed(one.title, run(one.title, jobs[kind]), goal=None)
    yield _scan(run("Mamba's scan", jobs["scan"]))


def family_jobs(memory_gib: float, *, dry: bool) -> dict[str, Job]:
    """Return the jobs of :func:`families` by kind; those that fit."""
    found: dict[str, Job] = {}
    for kind, one in SLICES.items():
        layers = 4 if dry else one.layers(memory_gib)
        if not layers:
            continue
        job = {"kind": "train", "size": "small" if dry else "slice", "slice": kind, "small": dry, "layers": layers}
        job |= {"precision": "bf16", "impl": "torch", "steps": 3 if dry else 10, "warmup": 1 if dry else 4}
        found[kind] = {**job, "freeze_vision": True, "own_weights": True}
    return {**found, "scan": {"kind": "scan", "small": dry}}


def slice_layers(memory_gib: float) -> int:
    """Return how many of the 14B's 40 language layers fit beside the frozen tower, with their optimizer.

    A layer has 315 M parameters: 18 bytes each in training (bf16 weight, fp32 gradient, master and two moments), and 2
    for FP8 copies. Tower (frozen), connector, vocabulary of 32768, logits and CUDA take some 17 GiB.
    """
    return max(0, min(8, int((0.9 * memory_gib - 17.0) / 6.2)))


ENGINES: dict[str, dict[str, Any]] = {
    "BF16": {},
    "FP8 (tensorwise)": {"fp8": "hybrid", "fp8_recipe": "tensorwise", "first_last_layers_bf16": False},
    "FP8 (delayed)": {"fp8": "hybrid", "fp8_recipe": "delayed"},
}


def speed(run: Runner, missing: str, memory_gib: float, *, dry: bool) -> Iterator[Row]:
    """Time one GPU's slice of the 14B in BF16 and FP8, and hold memory and time against the planner."""
    layers = 4 if dry else slice_layers(memory_gib)
    label = "14B slice" if not dry else "small model"
    torch_name = f"{label}, BF16, torch layers"
    if layers == 0:
        why = f"needs some 26 GiB of GPU memory, here are {memory_gib:.0f}"
        yield from (Row(f"{label}, {kind}", "not run", why) for kind in ("BF16, torch layers", *ENGINES))
        return
    jobs, done = slice_jobs(layers, missing, dry=dry), {}
    yield from _timed(torch_name, run(torch_name, jobs["torch"]))
    for kind in ENGINES:
        name = f"{label}, {kind}"
        if missing:
            yield Row(name, "not run", missing)
            continue
        done[kind] = run(name, jobs[kind])
        yield from _timed(name, done[kind])
    if "BF16" in done:
        yield _ratio("FP8 against BF16, tokens/s", done["FP8 (tensorwise)"], done["BF16"])


def slice_jobs(layers: int, missing: str, *, dry: bool) -> dict[str, Job]:
    """Return the jobs of :func:`speed` in their order, by engine; those that can run."""
    own = {"layers": layers, "freeze_vision": True, "own_weights": True}
    found = {"torch": _training("slice", "bf16", "torch", dry=dry, more=True, **own)}
    for kind, engine in ENGINES.items() if not missing else ():
        more = {"more": True} if kind != "FP8 (delayed)" else {}
        found[kind] = _training("slice", "bf16", ENGINE, dry=dry, engine=engine, **more, **own)
    return found


def _timed(name: str, outcome: Outcome, goal: float | None = GOAL_MFU) -> list[Row]:
    """The rows of a timed job: its speed, and what the planner had said; None where no goal was set."""
    row = _one(name, outcome, _speed)
    result = outcome.result
    if result is None:
        return [row]
    if result["mfu"] is not None and goal is not None:
        goal = GOAL_MFU_TORCH if "torch layers" in name else goal
        row.detail += f"; goal {goal:.0%} MFU: {'reached' if result['mfu'] >= goal else 'missed'}"
    told = [
        _against("memory, GiB", result["predicted_gib"], result["peak_gib"], MEMORY_WITHIN),
        _against("step, ms", result["predicted_step_ms"], result["step_ms"], TIME_WITHIN),
    ]
    told += [result["unpredicted"].replace("|", "/")] if "unpredicted" in result else []
    rows = [row, Row(f"{name}: the planner's prediction", "ok", "; ".join(told))]
    if "unseen_ms" in result:
        rows.append(_unseen(name, result))
        rows += [_mix(f"{name}, {mix}", figures) for mix, figures in result["mixes"].items()]
    return rows


def _unseen(name: str, result: dict[str, Any]) -> Row:
    ratio = result["unseen_ms"] / result["step_ms"]
    waits = result["waits"]
    told = f"packs never seen before: {ratio:.3f} of a step on repeated ones (goal: within {UNSEEN_WITHIN:.0%})"
    if waits is not None:
        places = ", ".join(f"{count} x {place}" for place, count in waits.items())
        told += f"; the host waited for the device {sum(waits.values())} times in forward and backward" + (
            f": {places}" if places else ""
        )
    return Row(f"{name}: unseen packs", "ok", told, {"ratio": ratio})


def _mix(name: str, figures: dict[str, Any]) -> Row:
    use = "" if figures["mfu"] is None else f", MFU {figures['mfu']:.1%} of the bf16 peak"
    told = (
        f"{figures['images_per_pack']:.1f} pictures a pack: step {figures['step_ms']:.1f} ms, "
        f"{figures['tokens_per_s']:,.0f} tokens/s, {figures['model_tflops']:.1f} model TFLOP/s{use}"
    )
    return Row(name, "ok", told, figures)


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


def decoders(run: Runner, *, dry: bool) -> Iterator[Row]:
    """Hold every decoder's pictures against PIL's, and their speed."""
    names = ["pil", "simplejpeg", *(["dali"] if installed("nvidia.dali") else [])]
    outcome = run(
        "decoders", {"kind": "decoders", "names": names, "images": 16 if dry else 128, "size": 64 if dry else 448}
    )
    for decoder in ("pil", "simplejpeg", "dali"):
        name = f"{decoder} decodes JPEGs as PIL does"
        if decoder not in names:
            yield Row(name, "not run", "nvidia-dali is not installed")
            continue
        if outcome.result is None:
            yield _unless_run(name, outcome) or Row(name, "failed", "")
            continue
        r = outcome.result[decoder]
        text = (
            f"on {r['device']}: {r['images_per_s']:,.0f} images/s of 640 x 480, mean difference "
            f"{r['mean_difference']:.2f} of 255, largest {r['max_difference']:.0f}, {r['failed']} failed"
        )
        yield Row(name, "ok" if r["failed"] == 0 and r["mean_difference"] < 1.0 else "failed", text, r)


def rates(run: Runner, *, dry: bool) -> Row:
    """Measure products, attention and copies; the planner can take them (megavlm plan --measured)."""
    name = "rates of products, attention and copies"
    outcome = run("rates", {"kind": "rates", "small": dry})
    if outcome.result is None:
        return _unless_run(name, outcome) or Row(name, "failed", "")
    r = outcome.result
    parts = [f"{m} x {n} x {k}: {tflops:.0f} TFLOP/s" for m, n, k, tflops in r["matmul"]]
    parts += [f"attention {t}/{s} x {h} x {w}: {rate:.0f} TFLOP/s" for t, s, h, w, _, rate in r["attention"]]
    parts += [f"copy {size / 2**20:.0f} MiB: {rate:,.0f} GB/s" for size, rate in r["copy"]]
    for size, *gbs in r["host"]:
        told = " / ".join(f"{one:.1f}" for one in gbs)
        parts.append(f"{size / 2**20:.0f} MiB to host pageable / pinned, and back: {told} GB/s")
    ok, wgrad = True, r["wgrad"]
    if wgrad is not None:
        parts.append(
            f"weight gradient of 2048 x 27392 x 5120: {wgrad['written_and_added_ms']:.2f} ms written and added"
        )
        if "in_product_ms" in wgrad:
            ok = wgrad["difference"] < 1e-2
            parts.append(f"{wgrad['in_product_ms']:.2f} ms in the product (difference {wgrad['difference']:.1e})")
    return Row(name, "ok" if ok else "failed", "; ".join(parts), r)


def save(run: Runner, *, dry: bool) -> Row:
    """Hold the stall of a save against copying its bytes to the host."""
    name = "saving a checkpoint"
    outcome = run("save", {"kind": "save", "small": dry})
    if outcome.result is None:
        return _unless_run(name, outcome) or Row(name, "failed", "")
    r = outcome.result
    stalls = ", ".join(f"{one:.2f}" for one in r["asynchronous_s"])
    told = f"{r['gib']:.2f} GiB: synchronous {r['synchronous_s']:.2f} s; asynchronous stalls {stalls} s"
    if "copy_s" in r:
        ratio = min(r["asynchronous_s"]) / r["copy_s"]
        told += f"; its bytes to pinned host memory {r['copy_s']:.2f} s: {ratio:.2f} times (goal {GOAL_STALL})"
    return Row(name, "ok", told, r)


# Name, processes, parallel branch. Losses and gradient norms must be those of one GPU.
LAYOUTS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("TP 2", 2, {"tensor_model_parallel_size": 2}),
    ("PP 2", 2, {"pipeline_model_parallel_size": 2}),
    ("CP 2", 2, {"context_parallel_size": 2}),
    ("CP 4", 4, {"context_parallel_size": 4}),
    ("PP 2 x VPP 2", 2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    ("DP 2", 2, {"overlap_grad_reduce": False, "overlap_param_gather": False}),
    ("DP 2, overlapped", 2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    (
        "TP 2 x PP 2 + SP",
        4,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    ),
    (
        "TP 2 x PP 2 x DP 2 + SP",
        8,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    ),
)


EXPERT_LAYOUTS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("EP 2", 2, {"expert_model_parallel_size": 2}),
    ("EP 2 x TP 2 + SP", 4, {
        "expert_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True,
    }),
    ("EP 4 x PP 2", 8, {"expert_model_parallel_size": 4, "pipeline_model_parallel_size": 2}),
)  # fmt: skip


def layouts(run: Runner, gpus: int, *, dry: bool) -> Iterator[Row]:
    """Hold layouts over several GPUs against one."""
    with tempfile.TemporaryDirectory() as folder:
        yield from _layouts(run, gpus, Path(folder) / "dense" / "step-00000000", dry=dry)


def _layouts(run: Runner, gpus: int, weights: Path, *, dry: bool) -> Iterator[Row]:
    more = {"layers": 4, "weights": str(weights)}
    one = run("one process, 4 layers", _training("small", "fp32", "torch", dry=dry, **more))
    for name, ranks, parallel in LAYOUTS:
        label = f"{name} against one GPU"
        if ranks > gpus:
            yield Row(label, "not run", f"needs {ranks} GPUs; make gpu-check GPUS={ranks}")
            continue
        job = _training("small", "fp32", "torch", dry=dry, parallel=parallel, ranks=ranks, **more)
        yield _compared(label, run(name, job), one, 1e-4)
    # Experts: their weights are in other places, so they begin with a checkpoint of their own.
    own = family_jobs(0.0, dry=True)["experts"]
    own |= {"precision": "fp32", "own_weights": False, "weights": str(weights.parent.parent / "experts" / weights.name)}
    alone = run("one process, experts", own)
    for name, ranks, parallel in EXPERT_LAYOUTS:
        label = f"experts, {name} against one GPU"
        if ranks > gpus:
            yield Row(label, "not run", f"needs {ranks} GPUs; make gpu-check GPUS={ranks}")
            continue
        yield _compared(label, run(f"experts, {name}", {**own, "parallel": parallel, "ranks": ranks}), alone, 1e-4)


PARTS = ("attention", "parity", "slice", "engine", "families", "rates", "save", "decoders", "layouts")
"""By their worth: what may run out of time comes last."""


def shared_processes(missing: str, memory_gib: float, *, dry: bool) -> dict[str, list[Job]]:
    """Return jobs that share a process, by part, in the order in which their rows are written."""
    small = [_training("small", precision, "torch", dry=dry) for precision in ("fp32", "bf16")]
    found = {"attention": [{"kind": "attention", "impl": "torch"}], "parity": small, "engine": []}
    if not missing:
        scalings = [{"fp8": "hybrid", "fp8_recipe": scaling} for scaling in SCALINGS]
        found["engine"] = [{"kind": "attention", "impl": ENGINE}, _training("small", "bf16", ENGINE, dry=dry)]
        found["engine"] += [_training("small", "bf16", ENGINE, dry=dry, engine=engine) for engine in scalings]
    layers = 4 if dry else slice_layers(memory_gib)
    found["slice"] = list(slice_jobs(layers, missing, dry=dry).values()) if layers else []
    found["families"] = list(family_jobs(memory_gib, dry=dry).values())
    return found


def check(run: Runner, *, dry: bool, gpus: int = 1, only: Sequence[str] = PARTS) -> Iterator[Row]:
    """Run everything of ``only``; what may run out of time comes last."""
    missing, memory_gib = "", 0.0
    if dry:
        missing = "needs a CUDA device"
    else:
        import torch

        memory_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
        if not installed(ENGINE):
            missing = "transformer-engine is not installed"
    shared = shared_processes(missing, memory_gib, dry=dry)
    run.together([job for part in ("attention", "parity") if part in only for job in shared[part]])
    for part in ("slice", "engine", "families"):
        run.together(shared[part])
    rows: dict[str, Callable[[], Iterable[Row]]] = {
        "attention": lambda: [
            _attention("bf16 attention, torch", run("attention, torch", {"kind": "attention", "impl": "torch"}))
        ],
        "parity": lambda: parity(run, dry=dry),
        "slice": lambda: speed(run, missing, memory_gib, dry=dry),
        "engine": lambda: engine(run, missing, dry=dry),
        "families": lambda: families(run, memory_gib, dry=dry),
        "rates": lambda: [rates(run, dry=dry)],
        "save": lambda: [save(run, dry=dry)],
        "decoders": lambda: decoders(run, dry=dry),
        "layouts": lambda: layouts(run, gpus, dry=dry),
    }
    try:
        for part in PARTS:
            if part in only:
                yield from rows[part]()
    finally:
        run.close()


def main() -> int:
    """Check, print and write the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "gpu-check.md",
        help="Markdown file to write; the figures go to a .json beside it",
    )
    parser.add_argument("--timeout", type=float, default=120, help="seconds that one job may take (default 120)")
    parser.add_argument("--limit", type=float, default=460, help="seconds that all jobs may take (default 460)")
    parser.add_argument(
        "--dry-run-cpu", action="store_true", help="the same jobs, small, on the CPU: tests this script"
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}"
    )
    parser.add_argument("--gpus", type=int, default=1, help="GPUs for the rows of several (default 1)")
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
    machine, rows, report = environment(), [], ""
    for row in check(run, dry=arguments.dry_run_cpu, gpus=arguments.gpus, only=arguments.only):
        rows.append(row)
        seconds = time.perf_counter() - start
        report = markdown(rows, machine, run, seconds)  # whole after every row: what follows may be cut off
        arguments.out.write_text(report, encoding="utf-8")
        arguments.out.with_suffix(".json").write_text(as_json(rows, machine, run, seconds), encoding="utf-8")
    print(report, end="")
    return 1 if any(row.status == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
