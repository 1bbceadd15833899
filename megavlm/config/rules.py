"""What rules between keys are written with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

TP = "parallel.tensor_model_parallel_size"


def divides(key: str, value: int, by: int, what: str) -> Iterator[str]:
    """Yield a line if ``value`` is not a multiple of ``by``, which the text ``what`` names."""
    if value % by:
        yield f"{key}: {value} is not divisible by {what} ({by}); change one of the two"


def choices(values: Sequence[int]) -> str:
    """Return numbers to choose among, sorted; of many the first ones and the last."""
    shown = [str(value) for value in sorted(values)]
    return ", ".join(shown) if len(shown) <= 6 else ", ".join([*shown[:5], "...", shown[-1]])
