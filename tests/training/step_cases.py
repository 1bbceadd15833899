"""Uneven global batches for the training step, and what two steps on them give; the cases that DP 2 must survive.

Run under torchrun with a JSON file to write: every rank takes its share of each micro-batch list. A rank that
waits in a collective that the other never enters hangs until the launcher's time-out.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megavlm.parallel.device import prepare_device

prepare_device()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from samples import Sample, pack, recipe, sample  # noqa: E402
from tiny import IMAGE_TOKEN  # noqa: E402

from megavlm.config.schema import ParallelConfig  # noqa: E402
from megavlm.data.batch import IGNORE_INDEX  # noqa: E402
from megavlm.data.device_batch import Batch  # noqa: E402
from megavlm.parallel.state import process_groups  # noqa: E402
from megavlm.training.build import build_training  # noqa: E402
from megavlm.training.step import train_step  # noqa: E402

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
FREEZE = {"freeze": True}


def supervised(one: Sample, count: int) -> Sample:
    """Return the sample with ``count`` supervised positions, from the front."""
    labels = one.labels.copy()
    labels[:] = IGNORE_INDEX
    labels[:count] = 11
    return Sample(one.tokens, labels, one.pixels)


def share(seed: int, images: int, count: int) -> Batch:
    """Return a micro-batch of 48 tokens with ``images`` images and ``count`` supervised positions."""
    first, second = sample(seed, 30, images), sample(seed + 50, 18)
    return pack([supervised(first, min(count, 30)), supervised(second, max(count - 30, 0))])


@dataclass
class Case:
    """Two replicas' micro-batches as (images, supervised positions), and changes to the recipe."""

    replicas: tuple[list[tuple[int, int]], list[tuple[int, int]]]
    branches: dict[str, Any] = field(default_factory=dict)

    def batches(self, step: int, replica: int) -> list[Batch]:
        """Return what one replica works on in a step."""
        return [share(100 * step + 10 * replica + i, *each) for i, each in enumerate(self.replicas[replica])]


TEXT_ON_ONE: Any = ([(2, 20), (1, 7)], [(0, 30), (0, 5)])
CASES = {
    "uneven": Case(([(1, 1), (0, 44)], [(2, 3), (1, 12)])),
    "a replica with nothing to learn": Case(([(1, 13), (2, 40)], [(1, 0), (0, 0)])),
    "a micro-batch with nothing to learn": Case(([(1, 0), (2, 40)], [(1, 9), (0, 0)]), {"parallel": OVERLAP}),
    "text on one": Case(TEXT_ON_ONE, {"parallel": OVERLAP}),
    "text on one, first pictures later": Case(([(0, 9), (1, 7)], [(0, 30), (0, 5)]), {"parallel": OVERLAP}),
    "text everywhere": Case(([(0, 9)], [(0, 30)]), {"parallel": OVERLAP}),
    "text on one, frozen tower": Case(TEXT_ON_ONE, {"parallel": OVERLAP, "modules": {"vision": FREEZE}}),
    "text on one, connector alone": Case(
        TEXT_ON_ONE, {"parallel": OVERLAP, "modules": {"vision": FREEZE, "language": FREEZE}}
    ),
    "text on one, tower alone": Case(
        TEXT_ON_ONE, {"parallel": OVERLAP, "modules": {"connector": FREEZE, "language": FREEZE}}
    ),
    "text on one, language alone": Case(
        TEXT_ON_ONE, {"parallel": OVERLAP, "modules": {"connector": FREEZE, "vision": FREEZE}}
    ),
    "text on one, recomputed": Case(
        TEXT_ON_ONE, {"parallel": {**OVERLAP, "recompute_granularity": "full"}}
    ),
}  # fmt: skip


def run(case: Case, replicas: list[int]) -> dict[str, Any]:
    """Take two steps on the micro-batches of ``replicas``; return losses, gradient norms and the weights' sums."""
    torch.manual_seed(0)
    # A large rate, and an epsilon that keeps the first steps from being mere signs.
    optimizer = {"lr": 1e-2, "adam_eps": 1e-3, "clip_grad": 1.0, "schedule": "constant"}
    training = build_training(recipe(optimizer=optimizer, **case.branches), IMAGE_TOKEN)
    losses, norms, tokens = [], [], []
    for step in range(2):
        batches = [batch for replica in replicas for batch in case.batches(step, replica)]
        training.scheduler.step(1)
        result = train_step(training.chunks, training.optimizer, batches, num_sources=1)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        tokens.append(result.supervised_tokens)
    with training.settled():
        weights = {name: p.detach().double().norm().item() for name, p in training.modules[0].named_parameters()}
    return {"loss": losses, "grad_norm": norms, "tokens": tokens, "weights": weights}


def main() -> None:
    """Run every case on two replicas."""
    with process_groups(ParallelConfig(), seed=1):
        results = {}
        for name, case in CASES.items():
            print("case:", name, flush=True)
            results[name] = run(case, [mpu.get_data_parallel_rank()])
        if dist.get_rank() == 0:
            Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
