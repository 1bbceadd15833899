"""Positional tables on a square grid of patches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_table(table: Tensor, grid: int) -> Tensor:
    """Interpolate a [rows, width] table of a square grid to ``grid`` x ``grid`` rows.

    Bicubic, ``align_corners=False``, computed in fp32 and cast back, as Qwen-VL's ``get_abs_pos`` does.
    """
    side = math.isqrt(table.size(0))
    if side == grid:
        return table
    square = table.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)


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
