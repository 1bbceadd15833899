"""What benchmarks share that hold sides against each other in one run: these take turns, and medians are reported."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

Answer = dict[str, Any]


def in_turns(label: str, sides: Mapping[str, Callable[[], Answer]], rounds: int) -> dict[str, list[Answer]]:
    """Return what each side answers round after round; each round begins with another side."""
    names = list(sides)
    answers: dict[str, list[Answer]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
            answers[name].append(sides[name]())
        print(f"{label}: round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    return answers


def timed(work: Callable[[], object]) -> Answer:
    """Return the seconds that ``work`` takes of the clock, and of this process's processors."""
    start, cpu_start = time.perf_counter(), time.process_time()
    work()
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}


def median(answers: list[Answer], key: str = "seconds") -> float:
    """Return the median over the rounds of one side."""
    return statistics.median(answer[key] for answer in answers)


def quotient(over: list[Answer], under: list[Answer], key: str = "seconds") -> float:
    """Return the median over the rounds of ``over`` / ``under``: neighbours in time, whatever else the machine does."""
    return statistics.median(a[key] / b[key] for a, b in zip(over, under, strict=True))
