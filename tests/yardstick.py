"""A fixed piece of plain Python work: what a bound on processor time is a multiple of, so that it holds anywhere.

A slower processor, and one whose caches are shared with others, takes longer for this and for what is measured; their
ratio stays. It does what much of this package does between tensors: makes frozen dataclasses and copies with other
values, hashes them, looks them up, adds numbers up over generators and walks small lists.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class _Choice:
    name: str
    sizes: tuple[int, ...]
    cost: float = 0.0


def _work(rounds: int) -> float:
    known: dict[_Choice, float] = {}
    total = 0.0
    for round_ in range(rounds):
        sizes = tuple((round_ * step) % 97 for step in range(1, 9))
        choice = replace(_Choice(f"stage {round_ % 4096}", sizes), cost=sum(size * 0.5 for size in sizes))
        if choice not in known:
            known[choice] = max(sizes) + min(sizes)
        ready = [0.0] * 8
        for at, size in enumerate(sizes):
            ready[at] = max(ready[at - 1], ready[at]) + size * 1e-3
        total += known[choice] + max(ready)
    return total


QUIET = 7.7e-6
"""Seconds of a round on an idle core of a Xeon of 2023 (model 207; the least of 1,500 times 200 rounds)."""


def slowness(rounds: int = 200) -> float:
    """Return how many times longer than there the work takes here and now, and at least 1. It costs milliseconds.

    The least of three: a search of all objects for garbage may fall into one.
    """
    return max(1.0, min(seconds(rounds) for _ in range(3)) / rounds / QUIET)


def seconds(rounds: int = 30_000) -> float:
    """Return the processor time that the work takes."""
    began = time.process_time()
    _work(rounds)
    return time.process_time() - began
