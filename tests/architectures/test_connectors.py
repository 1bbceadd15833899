"""Connectors equal plain torch modules on one device, on one rank; test_tensor_parallel.py has two."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from connector_cases import CASES, EMBED, IMAGES, PATCHES, compare

from megavlm.architectures.positions import resize_table, sincos_table


@pytest.mark.parametrize("name", CASES)
def test_a_connector_equals_its_reference(name: str) -> None:
    got = compare(name)
    assert got.shape == (CASES[name][0].get("num_queries", PATCHES), IMAGES, EMBED)


def test_the_sincos_table_encodes_columns_first() -> None:
    width, grid = 16, 3
    table = sincos_table(width, grid)
    assert table.shape == (grid * grid, width)
    quarter = width // 4
    for row in range(grid):
        for column in range(grid):
            for i in range(quarter):
                omega = 10000.0 ** (-i / quarter)
                got = table[row * grid + column]
                expected = torch.tensor([column * omega, row * omega])
                torch.testing.assert_close(got[[i, 2 * quarter + i]], expected.sin())
                torch.testing.assert_close(got[[quarter + i, 3 * quarter + i]], expected.cos())


def test_a_table_of_the_right_size_is_left_alone_and_rows_stay_rows() -> None:
    table = torch.arange(4.0).repeat_interleave(4)[:, None]  # the value is the row
    assert resize_table(table, 4) is table
    larger = resize_table(table, 8).view(8, 8)
    assert torch.equal(larger, larger[:, :1].expand(8, 8))
    assert (larger[1:, 0] > larger[:-1, 0]).all()


@pytest.mark.parametrize(("side", "grid"), [(16, 32), (4, 7), (24, 16)])
def test_a_resized_table_is_torchs_bicubic(side: int, grid: int) -> None:
    table = torch.randn(side * side, 12, requires_grad=True)
    square = table.view(1, side, side, 12).permute(0, 3, 1, 2)
    expected = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    expected = expected.permute(0, 2, 3, 1).flatten(0, 2)
    ours = resize_table(table, grid)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn_like(ours)
    mine, theirs = (torch.autograd.grad((one * weight).sum(), table)[0] for one in (ours, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
