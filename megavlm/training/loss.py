"""The loss of a step over its tasks: how much each supervised token counts.

Multi-task fine-tuning (MFT, arXiv 2311.02303; CodeFuse-VLM): the loss of a task is the mean over its supervised tokens,
and the loss of a step the mean of these, weighted. A task is one data set, or several that name it. With w_t the
weight of task t and N_t its supervised tokens in the global batch:

    loss = sum_t w_t / N_t * (sum of the task's token losses) / sum_t w_t,  over the tasks with N_t > 0

Megatron-Core sums token losses over micro-batches and replicas and divides the gradient by the number of supervised
tokens N. So each token is multiplied by N w_t / (N_t sum w) first. These factors are 1 on average, and need the counts
of the whole global batch before the first backward pass.

Shape legend: D data sets of ``data.train``, T tasks, M micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megavlm.config.checks import task_name
from megavlm.config.schema import Recipe
from megavlm.data.batch import IGNORE_INDEX
from megavlm.data.device_batch import Batch
from megavlm.parallel.state import data_group


class TaskMean:
    """Which data sets make a task, and what each task weighs.

    Args:
        tasks_D: [D] int64 index of each data set's task, from 0 without gaps.
        weights_T: [T] fp64 weight of each task, above 0.
    """

    def __init__(self, tasks_D: Tensor, weights_T: Tensor) -> None:
        self.tasks_D, self.weights_T = tasks_D, weights_T

    def token_factors(self, counts_D: Tensor) -> Tensor:
        """Return [D] fp64: the factor on the token losses of each data set.

        Args:
            counts_D: [D] supervised tokens of each data set in the global batch.
        """
        counts_T = self._by_task(counts_D.double())
        weights_T = self.weights_T.to(counts_T.device) * (counts_T > 0)
        shares_T = weights_T / weights_T.sum().clamp(min=1e-300)
        return (counts_T.sum() * shares_T / counts_T.clamp(min=1))[self.tasks_D.to(counts_T.device)]

    def loss(self, sums_D2: Tensor) -> Tensor:
        """Return the loss, a scalar, of [D, 2] sums of token losses and supervised tokens; 0 where there are none."""
        factors_D = self.token_factors(sums_D2[:, 1])
        return (factors_D * sums_D2[:, 0]).sum() / sums_D2[:, 1].sum().clamp(min=1)

    def _by_task(self, values_D: Tensor) -> Tensor:
        sums_T = torch.zeros(len(self.weights_T), dtype=values_D.dtype, device=values_D.device)
        return sums_T.index_add_(0, self.tasks_D.to(values_D.device), values_D)


def task_mean(recipe: Recipe) -> TaskMean | None:
    """Return the recipe's tasks, or None where the loss is the mean over all tokens."""
    if recipe.loss.kind == "token_mean":
        return None
    names = [task_name(source) for source in recipe.data.train]
    tasks = {name: index for index, name in enumerate(dict.fromkeys(names))}
    weights = {task_name(source): source.loss_weight for source in recipe.data.train}
    return TaskMean(
        torch.tensor([tasks[name] for name in names]),
        torch.tensor([weights[name] for name in tasks], dtype=torch.float64),
    )


def mean_loss(sums_D2: Tensor, tasks: TaskMean | None) -> float:
    """Return the loss, in nats, of [D, 2] sums of token losses and supervised tokens."""
    if tasks is not None:
        return float(tasks.loss(sums_D2))
    total, tokens = sums_D2.sum(0).tolist()
    return float(total / max(tokens, 1.0))


def supervised_tokens(batches: Sequence[Batch], num_sources: int) -> Tensor:
    """Return [D] int64 supervised tokens of each data set in the global batch.

    On the last stage, which has the labels; a collective over its replicas.
    """
    counts = torch.zeros(num_sources, dtype=torch.int64, device=batches[0].tokens.device)
    for batch in batches:
        assert batch.labels is not None
        mask = (batch.labels != IGNORE_INDEX).view(-1)
        counts.index_add_(0, batch.token_sources.clamp(min=0), mask.long())
    dist.all_reduce(counts, group=data_group())
    return counts
