"""Positional tables on a square grid of patches."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_table(table: Tensor, grid: int, *, antialias: bool = False) -> Tensor:
    """Interpolate a [rows, width] table of a square grid to ``grid`` x ``grid`` rows.

    Bicubic, ``align_corners=False``, computed in fp32 and cast back, as Qwen-VL's ``get_abs_pos`` does. It is a product
    with the weights of the interpolation: torch's own CUDA kernel has one thread for all channels of a row, and took
    20 ms a table on an H200, a quarter of the 14B slice's step (benchmarks/gpu.md).

    Args:
        table: the table.
        grid: side of the new one.
        antialias: with a filter against aliasing, and its other bicubic coefficient (DINOv2 with registers).
    """
    side = math.isqrt(table.size(0))
    if side == grid:
        return table
    return (_bicubic_weights(side, grid, table.device, antialias) @ table.float()).to(table.dtype)


@functools.lru_cache(maxsize=16)
def _bicubic_weights(side: int, grid: int, device: torch.device, antialias: bool) -> Tensor:
    """[grid * grid, side * side] fp32: what each row of the table adds to each row of the larger one."""
    with torch.inference_mode(False), torch.no_grad():
        unit = torch.eye(side * side, dtype=torch.float32, device="cpu").view(1, side * side, side, side)
        resized = F.interpolate(unit, size=(grid, grid), mode="bicubic", align_corners=False, antialias=antialias)
        return resized.view(side * side, grid * grid).t().contiguous().to(device)


def sincos_table(width: int, grid: int) -> Tensor:
    """Return the fixed 2D sin-cos table [grid * grid, width], fp32 (Qwen-VL's ``get_2d_sincos_pos_embed``).

    The first half of the width encodes the column, the second the row; each half is [sin | cos].
    """
    omega = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4.0))
    positions = torch.arange(grid, dtype=torch.float64)
    rows, columns = torch.meshgrid(positions, positions, indexing="ij")
    halves = []
    for coordinate in (columns, rows):
        angles = coordinate.reshape(-1, 1) * omega
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1).float()
