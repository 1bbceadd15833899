"""What other rooms ask of a tower that may be two."""

from __future__ import annotations

from typing import NamedTuple

Colours = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and deviation of red, green and blue."""


class TowerPart(NamedTuple):
    """A tower, or one of two that are one: what its learning rate goes by."""

    prefix: str
    """In front of the names of its parameters, within the tower."""
    layers: int
    rate: float
    """Factor on its learning rate."""
