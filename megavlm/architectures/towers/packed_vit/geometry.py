"""Where the patches of pictures of any size lie: coordinates, windows, and rows of a table; on the host, in numpy.

Patches of a picture come frame by frame, each frame block by block (``merge`` x ``merge`` patches), within each row by
row, as the published processors order them.

Shape legend: V pictures, P patches of all of them, K rows of a table that one patch takes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Picture = tuple[int, int, int]
"""Frames, rows and columns of patches."""


def pictures(grid_V3: Indices, merge: int) -> list[Picture]:
    """Return the pictures of a grid.

    Raises:
        ValueError: It is none: not [V, 3], or of parts of blocks.
    """
    if grid_V3.ndim != 2 or grid_V3.shape[1] != 3:
        raise ValueError(f"a grid of pictures is [V, 3], not {list(grid_V3.shape)}")
    found = [(int(t), int(h), int(w)) for t, h, w in grid_V3]
    for t, h, w in found:
        if min(t, h, w) < 1 or h % merge or w % merge:
            raise ValueError(f"a picture of {t} x {h} x {w} patches is not made of blocks of {merge} x {merge}")
    return found


def frame_lengths(shown: list[Picture]) -> list[int]:
    """Return the patches of each frame."""
    return [h * w for t, h, w in shown for _ in range(t)]


def coordinates(shown: list[Picture], merge: int) -> Indices:
    """[P, 2] row and column of each patch in its frame."""
    return np.concatenate([np.tile(_frame(h, w, merge), (t, 1)) for t, h, w in shown])


@functools.lru_cache(maxsize=256)
def _frame(rows: int, columns: int, merge: int) -> Indices:
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    shape = (rows // merge, merge, columns // merge, merge)
    return np.stack([one.reshape(shape).swapaxes(1, 2).ravel() for one in (row, column)], axis=1)


@dataclass(frozen=True)
class Windows:
    """Blocks of patches in the order of their windows."""

    order: Indices
    """[blocks] which block stands where."""
    lengths: list[int]
    """Patches of each window."""


def windows(shown: list[Picture], merge: int, side: int) -> Windows:
    """Return the windows of ``side`` x ``side`` blocks of each frame, row by row; those at the edges are smaller."""
    orders, lengths, first = [], [], 0
    for t, h, w in shown:
        order, own = _windows(h // merge, w // merge, side)
        for _ in range(t):
            orders.append(order + first)
            lengths += own
            first += len(order)
    return Windows(np.concatenate(orders), [length * merge**2 for length in lengths])


@functools.lru_cache(maxsize=256)
def _windows(rows: int, columns: int, side: int) -> tuple[Indices, list[int]]:
    row, column = (one.ravel() for one in np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"))
    window = row // side * (-(-columns // side)) + column // side
    return np.argsort(window, kind="stable"), np.bincount(window).tolist()


@dataclass(frozen=True)
class Taps:
    """Rows of a square table that are added up for each patch."""

    index: Indices
    """[P, K]"""
    weight: NDArray[np.float32]
    """[P, K]"""


Mode = Literal["bilinear", "bicubic", "antialias", "bucketed", "bucketed_line"]


def taps(shown: list[Picture], merge: int, side: int, mode: Mode) -> Taps:
    """Return what a table of ``side`` x ``side`` rows gives each patch, interpolated to its picture.

    Bilinear with the corners of both on each other, as ``F.interpolate(align_corners=True)``; bicubic with a = -0.75
    and without, as ``F.grid_sample(padding_mode="border")``; or as a picture is resized, bilinear and without, where it
    is made smaller over all that becomes one: ``F.interpolate(antialias=True)``. Bucketed: one row of the table, as
    Transformers' ``Idefics2VisionEmbeddings``, of the patch's row and column, or of its number in a line of all.
    """
    parts = [_taps(h, w, merge, side, mode) for _, h, w in shown]
    most = max(one.index.shape[1] for one in parts)
    parts = [one if one.index.shape[1] == most else _widened(one, most) for one in parts]
    index = np.concatenate([np.tile(one.index, (t, 1)) for (t, _, _), one in zip(shown, parts, strict=True)])
    weight = np.concatenate([np.tile(one.weight, (t, 1)) for (t, _, _), one in zip(shown, parts, strict=True)])
    return Taps(index, weight)


def _widened(one: Taps, most: int) -> Taps:
    """Return the same with so many rows for a patch, of which the new ones weigh nothing."""
    beside = ((0, 0), (0, most - one.index.shape[1]))
    return Taps(np.pad(one.index, beside), np.pad(one.weight, beside))


@functools.lru_cache(maxsize=256)
def _taps(rows: int, columns: int, merge: int, side: int, mode: str) -> Taps:
    place = _frame(rows, columns, merge)
    if mode == "bucketed_line":
        place = np.stack([np.zeros_like(place[:, 0]), place[:, 0] * columns + place[:, 1]], axis=1)
        rows, columns, mode = 1, rows * columns, "bucketed"
    down, down_weight = _along(place[:, 0], rows, side, mode)
    across, across_weight = _along(place[:, 1], columns, side, mode)
    index = (down[:, :, None] * side + across[:, None, :]).reshape(len(place), -1)
    weight = (down_weight[:, :, None] * across_weight[:, None, :]).reshape(len(place), -1)
    return Taps(index, weight.astype(np.float32))


def _along(at: Indices, length: int, side: int, mode: str) -> tuple[Indices, NDArray[np.float64]]:
    """Return rows of one axis of a table, and their weights, for places on an axis of another length."""
    if mode == "bucketed":
        return _bucket(at, length, side)[:, None], np.ones((len(at), 1))
    if mode == "antialias":
        return _covered(at, length, side)
    if mode == "bilinear":
        place = at * (side - 1) / max(length - 1, 1)
        offsets = np.arange(2)
    else:
        place = (at + 0.5) * side / length - 0.5
        offsets = np.arange(-1, 3)
    below = np.floor(place).astype(np.int64)
    found = below[:, None] + offsets
    away = np.abs(place[:, None] - found)
    if mode == "bilinear":
        weight = np.maximum(1 - away, 0)
    else:
        weight = _cubic(away, -0.75)
    return found.clip(0, side - 1), weight


def _covered(at: Indices, length: int, side: int, *, cubic: bool = False) -> tuple[Indices, NDArray[np.float64]]:
    """Return the rows under a triangle, or a cubic with a = -0.5, around each place.

    It is as wide as the rows that become one, and at least as wide as without any.
    """
    scale = side / length
    stretch, centre = max(scale, 1.0), scale * (at + 0.5)
    reach = stretch * (1 + cubic)
    first = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + reach + 0.5).astype(np.int64), side)
    found = first[:, None] + np.arange(int((last - first).max()))
    away = np.abs((found - centre[:, None] + 0.5) / stretch)
    weight = (_cubic(away, -0.5) if cubic else np.maximum(1 - away, 0)) * (found < last[:, None])
    return found.clip(0, side - 1), weight / weight.sum(1, keepdims=True)


@functools.lru_cache(maxsize=1024)
def antialiased(length: int, side: int) -> NDArray[np.float32]:
    """[length, side] what each row of one axis of a table adds to each of another length: cubic, as a picture is."""
    index, weight = _covered(np.arange(length), length, side, cubic=True)
    found = np.zeros((length, side), np.float32)
    np.add.at(found, (np.arange(length)[:, None], index), weight)
    return found


def _cubic(away: NDArray[np.float64], a: float) -> NDArray[np.float64]:
    near = ((a + 2) * away - (a + 3)) * away**2 + 1
    far = ((a * away - 5 * a) * away + 8 * a) * away - 4 * a
    return np.where(away <= 1, near, np.where(away < 2, far, 0.0))


def _bucket(at: Indices, length: int, side: int) -> Indices:
    """Return in which of ``side`` equal parts places on an axis lie: in fp32, where it decides about borders."""
    borders = (1 / side + np.arange(side - 1) / side).astype(np.float32)
    step = np.float32(1) / np.float32(length)
    parts = np.minimum(at.astype(np.float32) * step, np.float32(1 - 1e-6))
    return np.searchsorted(borders, parts, side="right").astype(np.int64)


def reading_order(shown: Picture, merge: int) -> Indices:
    """[P] of each patch of a picture of one frame, its number row by row."""
    _, rows, columns = shown
    place = _frame(rows, columns, merge)
    return place[:, 0] * columns + place[:, 1]
