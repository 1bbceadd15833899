"""The loss over a vocabulary that tensor-parallel ranks share, with the z-loss (arXiv 2204.02311, 5; 2405.09818, 2.3).

To the cross-entropy of a token, weight * log^2 Z is added, with Z the sum of the exponentials of its logits: this keeps
the logits of a softmax, which are free up to a constant, from drifting away.

Shape legend: S positions of a pack, V the padded vocabulary, of which a tensor-parallel rank has V / TP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor


class _CrossEntropyWithZ(torch.autograd.Function):
    """As Megatron-Core's unfused one, in as much memory: the logits become the gradient."""

    @staticmethod
    def forward(ctx: Any, logits_S1V: Tensor, labels_S1: Tensor, weight: float) -> Tensor:
        """Return [S, 1] losses in fp32; logits in fp32 are overwritten, as Megatron-Core's loss does."""
        group = mpu.get_tensor_model_parallel_group()
        logits_S1V = logits_S1V.float()
        largest_S1 = logits_S1V.amax(-1)
        dist.all_reduce(largest_S1, dist.ReduceOp.MAX, group)
        logits_S1V -= largest_S1.unsqueeze(-1)
        width = logits_S1V.size(-1)
        places_S1 = labels_S1 - group.rank() * width
        here_S1 = (places_S1 >= 0) & (places_S1 < width)
        places_S11 = places_S1.clamp(0, width - 1).unsqueeze(-1)
        said_S1 = logits_S1V.gather(-1, places_S11).squeeze(-1).where(here_S1, 0.0)
        shares_S1V = logits_S1V.exp_()
        sums_S1 = shares_S1V.sum(-1)
        both = torch.stack([said_S1, sums_S1])
        dist.all_reduce(both, group=group)
        said_S1, sums_S1 = both
        shares_S1V /= sums_S1.unsqueeze(-1)
        log_z_S1 = sums_S1.log() + largest_S1
        ctx.save_for_backward(shares_S1V, places_S11, here_S1, 1 + 2 * weight * log_z_S1)
        return sums_S1.log() - said_S1 + weight * log_z_S1.square()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the logits; a second backward pass is not possible."""
        gradient_S1V, places_S11, here_S1, factor_S1 = ctx.saved_tensors
        gradient_S1V *= factor_S1.unsqueeze(-1)
        gradient_S1V.scatter_add_(-1, places_S11, -here_S1.unsqueeze(-1).to(gradient_S1V.dtype))
        gradient_S1V *= gradients[0].unsqueeze(-1)
        return gradient_S1V, None, None


def add_z_loss(language: Any, weight: float) -> None:
    """Have a language model of Megatron-Core add the z-loss while it is in training mode; else its loss is what it was.

    Args:
        language: of a last stage.
        weight: of log^2 Z.
    """
    plain: Callable[[Tensor, Tensor], Tensor] = language.compute_language_model_loss

    def compute_language_model_loss(labels: Tensor, logits: Tensor) -> Tensor:
        """Return [1, S] losses of [1, S] labels and [S, 1, V / TP] logits."""
        if not language.training:
            return plain(labels, logits)
        losses_S1: Tensor = _CrossEntropyWithZ.apply(logits, labels.transpose(0, 1).contiguous(), weight)
        return losses_S1.transpose(0, 1).contiguous()

    language.compute_language_model_loss = compute_language_model_loss
