"""One optimizer step: forward and backward over all micro-batches on Megatron-Core's schedule, then the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.utils import get_model_config
from torch import Tensor

from megavlm.data.batch import IGNORE_INDEX
from megavlm.data.device_batch import Batch
from megavlm.parallel import pipeline
from megavlm.parallel.faults import fault, spoilt
from megavlm.parallel.state import any_rank, data_group, is_last_stage
from megavlm.training.experts import ExpertReport, move_biases, scale_losses, take_report
from megavlm.training.loss import TaskMean, mean_loss, supervised_tokens
from megavlm.training.vision import VisionPhases


@dataclass(frozen=True)
class StepResult:
    """What a step says about itself; equal on all ranks."""

    source_losses: Tensor
    """[D, 2] fp64: sum of the losses and number of supervised tokens, per data set, over the global batch."""
    grad_norm: float | None
    """Global gradient norm before clipping; None where the gradients were not looked at."""
    skipped: str | None = None
    """Why the update was not made, or None if it was."""
    tasks: TaskMean | None = None
    """How the data sets make the loss; None for the mean over all tokens."""
    experts: ExpertReport | None = None
    """What the routers of experts have done; None for a model without."""

    @property
    def loss(self) -> float:
        """The loss of the global batch, in nats: the mean over its supervised tokens, or over its tasks.

        NaN where it has none: 0 were the best loss of all.
        """
        return math.nan if self.empty else mean_loss(self.source_losses, self.tasks)

    @property
    def supervised_tokens(self) -> int:
        """Supervised tokens of the global batch."""
        return int(self.source_losses[:, 1].sum())

    @property
    def empty(self) -> bool:
        """Whether no token of the global batch has a label, so that there is neither a loss nor a gradient."""
        return self.supervised_tokens == 0


def _loss(batch: Batch, num_sources: int, factors: Tensor | None, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reduce [1, S] losses to their sum and token count, as Megatron-Core's per-token loss wants them.

    In the sum, the losses of each data set are multiplied by its entry of ``factors``, [D]. The third value is [D, 2]:
    the sum without these and the count per data set. Weights of answers are in both sums and not in the count: a token
    is one, whatever it weighs (as Megatron-SWIFT counts with its loss scale), so half a weight is half a gradient.
    """
    assert batch.labels is not None  # this runs on the last stage
    mask = (batch.labels != IGNORE_INDEX).view(-1)
    losses = losses.view(-1).float() * mask
    if batch.loss_weights is not None:
        losses = losses * batch.loss_weights.view(-1)
    sources = batch.token_sources.clamp(min=0)
    report = torch.zeros(num_sources, 2, dtype=torch.float64, device=losses.device)
    report[:, 0].index_add_(0, sources, losses.detach().double())
    report[:, 1].index_add_(0, sources, mask.double())
    if factors is not None:
        losses = losses * factors.float()[sources]
    return losses.sum(), mask.sum().int(), report


def forward_step(
    model: Any, batch: Batch, num_sources: int, factors: Tensor | None = None
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    """Run one model chunk on a micro-batch (a :data:`~megavlm.parallel.pipeline.Step`)."""
    fault("step.forward")
    output = model(**batch.inputs(with_labels=True))
    return output, partial(_loss, batch, num_sources, factors)


def run_batches(
    chunks: Sequence[Any],
    batches: Sequence[Batch],
    num_sources: int,
    *,
    forward_only: bool = False,
    tasks: TaskMean | None = None,
    vision: VisionPhases | None = None,
) -> Tensor:
    """Run all micro-batches through the pipeline; gradients are left in the buffers.

    They are those of the mean over all supervised tokens, or of ``tasks``. ``vision`` encodes the pictures first, where
    all ranks do.

    Returns:
        [D, 2] fp64 sums of loss and supervised tokens per data set over the global batch, on every rank.
    """
    report = torch.zeros(num_sources, 2, dtype=torch.float64, device=batches[0].tokens.device)
    factors = None
    if tasks is not None and is_last_stage():  # which has the labels, and the losses
        factors = tasks.token_factors(supervised_tokens(batches, num_sources))
    if vision is not None:
        batches = vision.encode(batches, backward=not forward_only)
    step = partial(forward_step, num_sources=num_sources, factors=factors)
    for found in pipeline.run(chunks, batches, step, batches[0].length, backward=not forward_only):
        report += found[2] if forward_only else found  # the schedule itself keeps losses and counts
    dist.all_reduce(report, group=data_group())
    return pipeline.from_last_stage(report).cpu()


def train_step(
    chunks: Sequence[Any],
    optimizer: MegatronOptimizer,
    batches: Sequence[Batch],
    num_sources: int,
    largest_loss: float | None = None,
    tasks: TaskMean | None = None,
    vision: VisionPhases | None = None,
) -> StepResult:
    """Take one optimizer step on ``batches``, this replica's share of the global batch.

    The update is made by all ranks or by none: a loss or gradient that is not finite, or a loss above
    ``largest_loss``, changes nothing. All ranks see the same figures, so they decide alike. Nor does a batch without
    labels change anything: its gradient is zero, but weight decay and Adam's moments would move the weights.
    """
    for chunk in [*chunks, *([] if vision is None else [vision.wrapped])]:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    config = get_model_config(chunks[0])
    scale_losses(chunks, batches, config)
    report = run_batches(chunks, batches, num_sources, tasks=tasks, vision=vision)
    experts = take_report(chunks, len(batches), config)
    fault("step.in_collective")
    _spoil_gradient(chunks)
    result = StepResult(report, None, "no token has a label", tasks, experts)
    if result.empty:
        return result
    loss = spoilt("loss.value", result.loss)
    if any_rank(not math.isfinite(loss)):
        return replace(result, skipped="the loss is not finite")
    if largest_loss is not None and loss > largest_loss:
        return replace(result, skipped=f"the loss is above {largest_loss:.4g}")
    result = _update(optimizer, result)
    if result.skipped is None:
        move_biases(chunks, experts)
    return result


def _spoil_gradient(chunks: Sequence[Any]) -> None:
    value = spoilt("gradient.value", 0.0)
    if value != 0.0:
        next(p for chunk in chunks for p in chunk.parameters() if p.requires_grad).main_grad.fill_(value)


def _update(optimizer: MegatronOptimizer, result: StepResult) -> StepResult:
    """Clip and step, as Megatron-Core's ``step`` does, unless the gradients are not finite."""
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())  # equal on all ranks: it is summed over all of them
    if not math.isfinite(norm):
        return replace(result, grad_norm=norm, skipped="the gradient is not finite")
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if norm + 1e-6 <= one.config.clip_grad:  # by which it would multiply nothing, having looked at all of them
            continue
        parameters = [] if getattr(one, "is_stub_optimizer", False) else one.get_parameters()
        if parameters and one.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(parameters, max_norm=one.config.clip_grad, total_norm=norm)
    optimizer.step_with_ready_grads()
    return replace(result, grad_norm=norm, skipped=None)
