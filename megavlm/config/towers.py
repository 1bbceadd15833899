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


class Rendered:
    """Pixels of a tower that takes equal squares: one of a picture, or several in one row."""

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of the squares that it takes of one picture."""
        raise NotImplementedError(f"{type(self).__name__} does not say which squares it takes")

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        """Shape of one picture's pixels."""
        return (3, *self.sides * 2) if len(self.sides) == 1 else (self.pixel_bytes,)

    @property
    def pixel_bytes(self) -> int:
        """Bytes of the pixels of one picture, uint8."""
        return 3 * sum(side**2 for side in self.sides)
