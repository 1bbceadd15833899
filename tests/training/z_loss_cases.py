"""What ranks do for :mod:`test_z_loss`."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state as mpu
from tiny import IMAGE_TOKEN, tiny_recipe

from megavlm.models.build import unwrap
from megavlm.parallel.state import process_groups
from megavlm.training.build import build_training


def losses(logits: torch.Tensor, labels: torch.Tensor, upstream: torch.Tensor, weight: float, tp: int) -> Any:
    """Return [S] losses in training and in evaluation, and the whole gradient [S, V] of the logits in training.

    Args:
        logits: [S, V] whole; each rank takes its part.
        labels: [S].
        upstream: [S] gradient of the losses.
        weight: of the z-loss.
        tp: tensor-parallel ranks.
    """
    recipe = tiny_recipe(parallel={"tensor_model_parallel_size": tp}, loss={"z_loss": weight})
    with process_groups(recipe.parallel, 1):
        language: Any = unwrap(build_training(recipe, IMAGE_TOKEN).chunks[0]).language
        part = logits.chunk(tp, 1)[mpu.get_tensor_model_parallel_rank()].unsqueeze(1).clone().requires_grad_()
        language.train()
        found = language.compute_language_model_loss(labels[None], part * 1.0)  # which the loss may overwrite
        found.backward(upstream[None])
        language.eval()
        with torch.no_grad():
            plain = language.compute_language_model_loss(labels[None], part.detach().clone())
        assert part.grad is not None
        return found[0].detach(), plain[0], part.grad[:, 0]
