"""Frozen weights in 4 bits: NF4 with double quantisation (QLoRA, arXiv 2305.14314), by bitsandbytes.

A layer's whole weight is quantised as one, and each tensor-parallel rank keeps its share of the codes: all layouts have
the same numbers. The dimension that is cut comes first, so shares are whole groups of scales
(:mod:`megavlm.config.lora` checks it).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megavlm.config.lora import NF4_BLOCK, NF4_GROUP

# On some CPUs it warns, when it is imported, that it lacks a kernel for products that are not made here.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in record.getMessage()
)


@dataclass
class NF4Weight:
    """A rank's share of a quantised weight.

    Attributes:
        codes: uint8 [values / 2], two codes in each.
        scales: uint8 [values / 64], the scale of each block, itself quantised.
        group_scales: fp32 [values / (64 x 256)], the scale of each 256 of these.
        offset: fp32 scalar, added to all scales.
        scale_values: fp32 [256], what the codes of scales mean.
        shape: of the share; of its transpose, if ``transposed``.
        dtype: of the weight.
        transposed: the weight's second dimension was cut.
    """

    codes: Tensor
    scales: Tensor
    group_scales: Tensor
    offset: Tensor
    scale_values: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    transposed: bool

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return sum(t.nbytes for t in (self.codes, self.scales, self.group_scales))

    def dequantise(self) -> Tensor:
        """Return the share in full precision, [out, in] or its piece."""
        from bitsandbytes.functional import QuantState, dequantize_4bit  # noqa: PLC0415

        inner = QuantState(absmax=self.group_scales, code=self.scale_values, blocksize=NF4_GROUP, dtype=torch.float32)
        state = QuantState(
            absmax=self.scales, shape=torch.Size(self.shape), code=_nf4_values(self.codes.device), blocksize=NF4_BLOCK,
            quant_type="nf4", dtype=self.dtype, offset=self.offset, state2=inner,
        )  # fmt: skip
        weight = dequantize_4bit(self.codes.view(-1, 1), state)
        return weight.t() if self.transposed else weight


@functools.lru_cache(maxsize=16)
def _nf4_values(device: torch.device) -> Tensor:
    """Return the 16 values of a code: made once, since the copy from the host waits for the device."""
    from bitsandbytes.functional import get_4bit_type  # noqa: PLC0415

    with torch.inference_mode(False):
        values: Tensor = get_4bit_type("nf4", device=device)
    return values


def quantise(weight: Tensor, pieces: Sequence[tuple[int, int]], *, transposed: bool) -> NF4Weight:
    """Quantise a whole weight and keep a share of it.

    Args:
        weight: [out, in], 16 or 32 bits, on the device that is to hold the share.
        pieces: (start, stop) of the rows to keep, or of the columns if ``transposed``.
        transposed: it is cut along its second dimension.
    """
    from bitsandbytes.functional import quantize_4bit  # noqa: PLC0415

    whole = (weight.t() if transposed else weight).contiguous()
    codes, state = quantize_4bit(whole, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4")
    rows, width = whole.shape
    everything = list(pieces) == [(0, rows)]

    def share(values: Tensor, per: int) -> Tensor:
        """Cut what has one entry for ``per`` weights."""
        if everything:
            return values.clone()
        cuts = [(start * width, stop * width) for start, stop in pieces]
        assert all(edge % per == 0 for cut in cuts for edge in cut), (pieces, width, per)
        return torch.cat([values[start // per : stop // per] for start, stop in cuts])

    return NF4Weight(
        codes=share(codes.view(-1), 2),
        scales=share(state.absmax, NF4_BLOCK),
        group_scales=share(state.state2.absmax, NF4_BLOCK * NF4_GROUP),
        offset=state.offset.clone(),
        scale_values=state.state2.code.clone(),
        shape=(sum(stop - start for start, stop in pieces), width),
        dtype=weight.dtype,
        transposed=transposed,
    )


class _FrozenLinear(torch.autograd.Function):
    """x W^T + b with a W that is in full precision only while it is multiplied, here and in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
        """Multiply."""
        ctx.weight = weight
        return F.linear(x, weight.dequantise(), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of x; weight and bias are frozen."""
        return grads[0].matmul(ctx.weight.dequantise()), None, None


def frozen_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
    """Return x [..., in] times the weight, plus the bias: [..., out]."""
    output: Tensor = _FrozenLinear.apply(x, weight, bias)
    return output
