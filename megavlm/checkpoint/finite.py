"""Finite numbers: NaN and infinity are refused on the way in, and where a narrower type would make them."""

from __future__ import annotations

import torch
from torch import Tensor

from megavlm.config.errors import UserError


def check_finite(tensor: Tensor, where: str) -> None:
    """Check that a tensor holds finite numbers alone.

    Args:
        tensor: of floating point.
        where: file and name, for the message.

    Raises:
        UserError: it holds NaN or infinity.
    """
    if not is_finite(tensor):
        nans = int(tensor.isnan().sum())
        what = f"{nans:,} NaN" if nans else f"{int(tensor.isinf().sum()):,} infinite values"
        raise UserError(
            f"{where}: holds {what} among {tensor.numel():,} values, with which nothing can be computed; take another "
            "copy"
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite, without a second tensor of its size."""
    if not tensor.numel():
        return True
    low, high = tensor.aminmax()  # NaN wins in both
    return bool(torch.isfinite(low) and torch.isfinite(high))


def narrowed(tensor: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """Return ``tensor`` as ``dtype``.

    Rounding is what a narrower type is; a value that it has no room for is not.

    Raises:
        UserError: a finite value would become infinite.
    """
    result = tensor.to(dtype)
    if tensor.dtype != dtype and not is_finite(result):
        check_finite(tensor, where)
        largest = float(tensor.abs().max())
        name = str(dtype).removeprefix("torch.")
        raise UserError(
            f"{where}: its largest value {largest:g} would be infinite in {name}, which ends at "
            f"{torch.finfo(dtype).max:g}; take bf16 or fp32"
        )
    return result


def vanished(before: Tensor, after: Tensor) -> int:
    """Return how many values a narrower type made 0."""
    return int((after == 0).sum() - (before == 0).sum()) if before.dtype != after.dtype else 0
