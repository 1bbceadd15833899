"""Rates that one device was measured to have (``make gpu-check`` writes them), for ``megavlm plan --measured``.

Schema of the file, of which other keys are not read::

    {"machine": {"device": "1 x NVIDIA H100 80GB HBM3, 79 GiB, sm_90"},
     "rates": {"matmul": [[m, n, k, TFLOP/s], ...],
               "attention": [[tokens, length of a segment, heads, width of a head, causal, TFLOP/s], ...],
               "copy": [[bytes, GB/s read and written], ...]}}

Between what was measured, the logarithm of a rate is the mean over all points, weighted by the inverse square of their
distance in the logarithms of the sizes (Shepard's interpolation): exact at the points, and never outside of them.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.config.errors import RecipeError

_COLUMNS = {"matmul": 4, "attention": 6, "copy": 2}
_CAUSAL = 1.0
"""How far causal attention is from full attention, in doublings of a size."""


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, by size. FLOP are two for a multiply-add; masked halves are not counted."""

    device: str
    """Its name, as torch has it."""
    memory_gib: float | None
    """Memory that a process saw."""
    matmul: tuple[tuple[float, ...], ...]
    """m, n, k, FLOP/s of bf16 products."""
    attention: tuple[tuple[float, ...], ...]
    """Tokens, length of a segment, heads, width, causal (0 or 1), FLOP/s of forward and backward together."""
    copy: tuple[tuple[float, ...], ...]
    """Bytes of a tensor, bytes/s read and written."""

    def product(self, m: float, n: float, k: float) -> float:
        """Return the FLOP/s of a product; its two backward products have the same three sizes."""
        points = tuple((_logs(sorted(row[:3])), row[3]) for row in self.matmul)
        return _between(points, _logs(sorted((m, n, k))))

    def attend(self, length: float, heads: float, width: float, *, causal: bool) -> float:
        """Return the FLOP/s of attention in segments of ``length``."""
        points = tuple((*_logs((row[1], row[2], row[3])), row[4] * _CAUSAL) for row in self.attention)
        at = (*_logs((length, heads, width)), causal * _CAUSAL)
        return _between(tuple(zip(points, (row[5] for row in self.attention), strict=True)), at)

    def stream(self, size: float) -> float:
        """Return the bytes/s of element-wise work on tensors of ``size`` bytes."""
        return _between(tuple((_logs(row[:1]), row[1]) for row in self.copy), _logs((size,)))


def _logs(sizes: Sequence[float]) -> tuple[float, ...]:
    return tuple(math.log2(max(size, 1.0)) for size in sizes)


@functools.lru_cache(maxsize=65536)
def _between(points: tuple[tuple[tuple[float, ...], float], ...], at: tuple[float, ...]) -> float:
    weights, logs = [], []
    for where, rate in points:
        distance = sum((a - b) ** 2 for a, b in zip(where, at, strict=True))
        if distance < 1e-12:
            return rate
        weights.append(1 / distance)
        logs.append(math.log(rate))
    return math.exp(sum(w * x for w, x in zip(weights, logs, strict=True)) / sum(weights))


def read_rates(path: Path) -> Rates:
    """Read a file of ``make gpu-check`` (``benchmarks/gpu-check.json``).

    Raises:
        RecipeError: it cannot be read, has no rates, or has some that are none.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"--measured: {path} cannot be read: {error}; name what make gpu-check wrote") from None
    rates = tree.get("rates") if isinstance(tree, dict) else None
    if not isinstance(rates, dict) or not rates:
        raise RecipeError(f"--measured: {path} has no rates; run make gpu-check on the device, with its row of rates")
    machine = tree.get("machine")
    device = str(machine.get("device", "")) if isinstance(machine, dict) else ""
    if device.startswith("CPU"):
        raise RecipeError(f"--measured: {path} is of a dry run on a CPU; run make gpu-check on the device")
    parts = re.fullmatch(r"(?:\d+ x )?(.*?)(?:, (\d+(?:\.\d+)?) GiB.*)?", device)
    assert parts is not None
    found = {name: _table(path, name, rates.get(name)) for name in _COLUMNS}
    return Rates(parts[1], float(parts[2]) if parts[2] else None, **found)


def _table(path: Path, name: str, rows: Any) -> tuple[tuple[float, ...], ...]:
    """Check a table and return it in FLOP/s or bytes/s."""
    columns, unit = _COLUMNS[name], 1e9 if name == "copy" else 1e12
    if not isinstance(rows, list) or not rows:
        raise RecipeError(f"--measured: {path} has no rates.{name}; run make gpu-check with its row of rates again")
    found = []
    for number, row in enumerate(rows):
        numbers = isinstance(row, list) and len(row) == columns and all(isinstance(x, (int, float)) for x in row)
        if not numbers or not all(math.isfinite(x) and x >= 0 for x in row) or row[-1] <= 0 or min(row[:3]) <= 0:
            raise RecipeError(
                f"--measured: {path}: rates.{name}.{number} is {json.dumps(row)[:80]}, not {columns} numbers above 0"
                " (docs/planning.md has the format); measure again"
            )
        found.append((*map(float, row[:-1]), row[-1] * unit))
    return tuple(found)
