"""What is known of a film before its frames are decoded: their size, number and times.

``megavlm prepare`` makes it once and stores it beside the film; a reader needs nothing else to know how many tokens a
film has, and the decoder finds its frames by it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from megavlm.data.films.plan import FilmError, FilmShape

_VERSION = 1
MOST_INDEX = 1 << 26
"""Bytes of an index, unpacked: those of four million frames."""
MOST_STORED_FRAMES = 4_000_000
"""Films of more frames are refused: an hour has 216,000 at 60 a second."""


def _none() -> NDArray[np.int64]:
    return np.zeros(0, np.int64)


@dataclass(frozen=True)
class FilmIndex:
    """The frames of a film, N of them."""

    width: int
    """Pixels of an upright frame."""
    height: int
    """Pixels of an upright frame."""
    frames: int
    """N."""
    rate: float
    """Frames in a second, on average."""
    sampled: bool = False
    """Whether it is a folder of frames."""
    times: NDArray[np.int64] = field(default_factory=_none)
    """[N] when each frame is shown, increasing, in units of ``unit``; none where the film does not say, or is a folder
    of frames."""
    keys: NDArray[np.int64] = field(default_factory=_none)
    """Those of ``times`` from which decoding may start."""
    unit: Fraction = Fraction(1)
    """Seconds."""

    def shape(self, shown: int = 1) -> FilmShape:
        """Return what a plan asks of the film, of a conversation with so many pictures and films."""
        return FilmShape(self.width, self.height, self.frames, self.rate, shown, self.sampled)

    def picked(self, indices: Sequence[int]) -> NDArray[np.int64]:
        """Return the frames that stand for a plan's ``indices``.

        Where frames follow each other evenly, these are the same. Where they do not, frame ``i`` of a plan is what is
        shown ``i / rate`` seconds after the first frame.
        """
        wanted = np.asarray(indices, np.int64)
        if not len(self.times):
            return wanted
        seconds = (self.times - self.times[0]) * float(self.unit)
        if np.abs(seconds - np.arange(self.frames) / self.rate).max() <= 0.5 / self.rate:
            return wanted
        # A frame that begins at this time is the one that is shown, whatever the rounding.
        found = np.searchsorted(seconds, wanted / self.rate + 1e-6, side="right") - 1
        return found.clip(0, self.frames - 1)

    def to_bytes(self) -> bytes:
        """Return it as :meth:`from_bytes` reads it; equal ones give equal bytes."""
        tree = {
            "version": _VERSION, "width": self.width, "height": self.height, "frames": self.frames, "rate": self.rate,
            "sampled": self.sampled, "unit": [self.unit.numerator, self.unit.denominator],
            "times": np.diff(self.times, prepend=0).tolist(), "keys": np.diff(self.keys, prepend=0).tolist(),
        }  # fmt: skip
        return zlib.compress(json.dumps(tree, separators=(",", ":")).encode(), 6)

    @classmethod
    def from_bytes(cls, data: bytes) -> FilmIndex:
        """Return a stored index.

        Raises:
            FilmError: It is none.
        """
        try:
            packed = zlib.decompressobj()
            text = packed.decompress(data, MOST_INDEX)
            if not packed.eof:
                raise ValueError("it is cut short, or too long")
            tree = json.loads(text)
            if tree["version"] != _VERSION:
                raise ValueError(f"it is of version {tree['version']!r}")
            times, keys = (np.cumsum(np.asarray(tree[name], np.int64)) for name in ("times", "keys"))
            width, height, frames = (_whole(tree[name]) for name in ("width", "height", "frames"))
            unit = Fraction(*map(_whole, tree["unit"]))
            found = cls(width, height, frames, float(tree["rate"]), bool(tree["sampled"]), times, keys, unit)
        except (KeyError, TypeError, ValueError, ArithmeticError, RecursionError, zlib.error) as error:
            raise FilmError("broken index", str(error)) from None
        if len(times) not in (0, found.frames) or (np.diff(times) <= 0).any() or not np.isin(keys, times).all():
            raise FilmError("broken index", "its times are not those of its frames")
        return found


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{value!r} is no whole number above 0")
    return value
