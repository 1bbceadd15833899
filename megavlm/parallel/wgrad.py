"""Weight gradients that are added to fp32 in the product itself, without Apex.

Megatron-Core's ``gradient_accumulation_fusion`` calls one function of Apex's ``fused_weight_gradient_mlp_cuda``.
Without it, each weight gradient is written in bf16, read again and added to the fp32 buffer. torch (2.8 and later) has
the same product: cuBLAS's, with fp32 output, added to what is there.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from types import SimpleNamespace

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def accumulate_fp32(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """Add ``grad_output.T @ total_input`` to ``main_grad``, as Apex's ``wgrad_gemm_accum_fp32`` does.

    Args:
        total_input: [T, in] bf16 or fp16; leading dimensions are joined.
        grad_output: [T, out], likewise.
        main_grad: [out, in] fp32.
    """
    inputs, outputs = total_input.flatten(0, -2), grad_output.flatten(0, -2)
    torch.addmm(main_grad, outputs.t(), inputs, out_dtype=torch.float32, out=main_grad)


@functools.cache
def has_apex() -> bool:
    """Whether Apex's own kernel is installed."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


@functools.cache
def works() -> bool:
    """Whether this device and torch have the product; tried once on a small one."""
    if not torch.cuda.is_available():
        return False
    try:
        device = torch.device("cuda", torch.cuda.current_device())
        a = torch.ones(8, 16, dtype=torch.bfloat16, device=device)
        b = torch.ones(8, 32, dtype=torch.bfloat16, device=device)
        total = torch.ones(32, 16, dtype=torch.float32, device=device)
        accumulate_fp32(a, b, total)
        return bool((total == 9.0).all())
    except (RuntimeError, TypeError, NotImplementedError) as error:
        logger.warning("gradient_accumulation_fusion: torch.addmm with fp32 output does not work here: %s", error)
        return False


def install() -> None:
    """Give Megatron-Core's linear layers this function in the place of Apex's, where Apex is not there."""
    from megatron.core.tensor_parallel import layers  # noqa: PLC0415 - not before prepare_device

    if has_apex() or not works():
        return
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate_fp32)
    layers._grad_accum_fusion_available = True
