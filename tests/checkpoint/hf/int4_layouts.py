"""GPTQ's and AWQ's 4-bit layouts turned back into plain weights: a reference, written from their definitions.

GPTQ: AutoGPTQ's ``QuantLinear`` (``auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py``): eight inputs in a number, the
first in the lowest bits; zero points are stored less one; ``g_idx`` names each input's group. AWQ: AutoAWQ's
``WQLinear_GEMM`` (``awq/modules/linear/gemm.py``, ``awq/utils/packing_utils.py``): eight outputs in a number, in the
order 0, 2, 4, 6, 1, 3, 5, 7; zero points as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)
_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def _columns(packed: Tensor) -> Tensor:
    """Return [R, C * 8] numbers of 4 bits of [R, C], the lowest bits first."""
    return ((packed[:, :, None] >> _SHIFTS) & 15).flatten(1)


def _awq_columns(packed: Tensor) -> Tensor:
    found = (packed[:, :, None] >> _SHIFTS) & 15
    ordered = torch.empty_like(found)
    ordered[:, :, _AWQ_ORDER] = found
    return ordered.flatten(1)


def _gptq(tensors: Mapping[str, Tensor], stem: str, group_size: int) -> Tensor:
    numbers = _columns(tensors[f"{stem}.qweight"].T.contiguous()).T  # [in, out]
    groups = tensors[f"{stem}.g_idx"].long()
    assert torch.equal(groups, torch.arange(len(numbers)) // group_size)
    zeros = _columns(tensors[f"{stem}.qzeros"]) + 1
    return ((numbers - zeros[groups]) * tensors[f"{stem}.scales"].float()[groups]).T.contiguous()


def _awq(tensors: Mapping[str, Tensor], stem: str, group_size: int) -> Tensor:
    numbers = _awq_columns(tensors[f"{stem}.qweight"])  # [in, out]
    groups = torch.arange(len(numbers)) // group_size
    zeros = _awq_columns(tensors[f"{stem}.qzeros"])
    return ((numbers - zeros[groups]) * tensors[f"{stem}.scales"].float()[groups]).T.contiguous()


def dequantised(tensors: Mapping[str, Tensor], layout: str, group_size: int) -> dict[str, Tensor]:
    """Return the tensors with ``weight`` [out, in] in fp32 for each quantised layer."""
    stems = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    packed = {f"{stem}.{part}" for stem in stems for part in ("qweight", "qzeros", "scales", "g_idx")}
    plain = {name: tensor for name, tensor in tensors.items() if name not in packed}
    turn = {"gptq": _gptq, "awq": _awq}[layout]
    return plain | {f"{stem}.weight": turn(tensors, stem, group_size) for stem in stems}
