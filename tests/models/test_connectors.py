"""Connectors equal plain torch modules on one device, on one rank; test_tensor_parallel.py has two."""

from __future__ import annotations

import pytest
import torch
from connector_cases import CASES, EMBED, IMAGES, PATCHES, compare

from megavlm.models.positions import resize_table, sincos_table


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
