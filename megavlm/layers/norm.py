"""Norms in plain torch whose parameters carry the mark that sequence parallelism needs.

Megatron-Core all-reduces the gradients of parameters marked ``sequence_parallel`` over the tensor-parallel
ranks, each of which saw its part of the sequence. Without the mark training goes wrong silently.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class TorchNorm(torch.nn.Module):
    """LayerNorm or RMSNorm over the last dimension, as ``config.normalization`` says.

    RMSNorm computes in fp32, casts back and then applies the weight, as Qwen does. On CUDA it is torch's one kernel,
    which applies the weight before it casts: the same in fp32, within a rounding in bf16.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.rms = config.normalization == "RMSNorm"
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = None if self.rms else torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., hidden_size]; dtype and shape stay."""
        if self.rms and x.is_cuda:
            return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)
        if self.rms and not torch.is_grad_enabled():  # the same operations; quicker for one token
            wide = x.float()
            return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight
        if self.rms:
            return F.rms_norm(x.float(), (x.size(-1),), None, self.eps).to(x.dtype) * self.weight
        return F.layer_norm(x, (x.size(-1),), self.weight, self.bias, self.eps)
