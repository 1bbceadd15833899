"""Rows that ranks of a group hand to each other, as many to each as they like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor


def exchange(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: Any) -> Tensor:
    """Return the rows that the ranks of ``group`` have for this one, in the order of ranks; a collective.

    Args:
        rows: [sum of sent, ..]: first those for the group's first rank; of one number type and width on all ranks.
        sent: how many of them are for each rank.
        received: how many come from each.
        group: the process group.
    """
    assert sum(sent) == rows.size(0), (sent, rows.shape)
    found = rows.new_empty(sum(received), *rows.shape[1:])
    if group.size() == 1:
        return found.copy_(rows)
    dist.all_to_all_single(found, rows.contiguous(), list(received), list(sent), group=group)
    return found
