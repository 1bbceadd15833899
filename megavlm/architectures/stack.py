"""The cost of linear layers one behind the other (``megavlm/layers/stack.py``). Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def stack_parameters(widths: Sequence[int], tensor: int, *, bias: bool = True) -> list[int]:
    """Return the elements of each parameter on one rank, in the order of the module.

    Args:
        widths: of the input, and of what each layer gives.
        tensor: tensor-parallel ranks.
        bias: whether each layer has one.
    """
    shapes = []
    for layer, (size_in, size_out) in enumerate(pairwise(widths)):
        shapes.append(size_in * size_out // tensor)
        shapes += [size_out // tensor if layer % 2 == 0 else size_out] * int(bias)
    return shapes


def stack_work(widths: Sequence[int], tokens: float) -> float:
    """Return the operations of a forward pass of so many tokens."""
    return 2 * tokens * sum(a * b for a, b in pairwise(widths))


def stack_kept(widths: Sequence[int], tensor: int, *, learns: bool) -> int:
    """Return the numbers of one token that it keeps: its input, and what lies around each activation."""
    total = widths[0] * int(learns)
    for layer, width in enumerate(widths[1:-1]):
        total += (width // tensor if layer % 2 == 0 else width) * (1 + int(learns))
    return total
