"""What ``gpu_check`` says of its jobs: rows of losses against losses, of attention, of the scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_runner import Outcome, Row

ATTENTION_LIMIT = 0.02
"""Of bf16 attention against fp32, relative to the largest value: some three of its roundings."""


def _speed(result: dict[str, Any]) -> str:
    parts = [
        f"{result['parameters'] / 1e6:,.0f} M parameters, {result['layers']} language layers",
        f"step {result['step_ms']:.1f} ms",
        f"{result['tokens_per_s']:,.0f} tokens/s",
        f"{result['images_per_s']:,.1f} images/s",
    ]
    if result["model_tflops"] is not None:
        parts.append(f"{result['model_tflops']:.1f} model TFLOP/s")
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
    if not (_finite(ours.result) and _finite(theirs.result)):
        return Row(name, "failed", "a loss or gradient norm is not finite")
    apart = {}
    for key in ("losses", "grad_norms"):
        pairs = list(zip(ours.result[key], theirs.result[key], strict=True))[:steps]
        apart[key] = max(abs(a - b) / abs(b) for a, b in pairs)
    # A norm is less exact than a loss, and shows more: it reaches every weight.
    ok = apart["losses"] <= limit and apart["grad_norms"] <= 10 * limit
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
    failed = {name: case["error"] for name, case in cases.items() if "error" in case}
    figures = {name: max(case.values()) for name, case in cases.items() if name not in failed}
    told = ", ".join([*(f"{case} {value:.1e}" for case, value in figures.items()), *map(": ".join, failed.items())])
    good = not failed and all(value <= ATTENTION_LIMIT for value in figures.values())  # not so for NaN
    status = "ok" if good else "failed"
    return Row(name, status, f"relative difference of outputs and gradients: {told} (limit {ATTENTION_LIMIT})", cases)


def _scan(outcome: Outcome) -> Row:
    name = "Mamba's convolution and scan of a pack, forward and backward"
    if outcome.result is None:
        return _unless_run(name, outcome) or Row(name, "failed", "")
    r, told = outcome.result, []
    for way, called in (("torch", "torch"), ("kernel", "mamba-ssm")):
        if way in r:
            what = max(r[way], key=lambda name, found=r[way]: (found[name] != found[name], found[name]))  # NaN is worst
            told.append(f"{called} {r[f'{way}_ms']:.1f} ms, off by {r[way][what]:.1e} ({what})")
    good = all(value <= ATTENTION_LIMIT for way in ("torch", "kernel") for value in r.get(way, {}).values())
    words = (
        "; ".join(told) + f": the largest difference from the definition in fp32, of outputs and {len(r['torch']) - 1}"
    )
    words += f" gradients, a pack of three segments (limit {ATTENTION_LIMIT})"
    if "kernel" not in r:
        words += "; mamba-ssm and causal-conv1d are not installed"
    return Row(name, "ok" if good else "failed", words, r)
