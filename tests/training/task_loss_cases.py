"""Steps with the loss over tasks at several layouts, in one job of four processes. Run under torchrun.

Arguments: a checkpoint with the weights to start from; a JSON file to write.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megavlm.parallel.device import prepare_device

prepare_device()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from tiny import IMAGE_TOKEN, random_packs, tiny_recipe  # noqa: E402

from megavlm.checkpoint import distributed as checkpoint  # noqa: E402
from megavlm.config.schema import Recipe  # noqa: E402
from megavlm.data.batch import IGNORE_INDEX  # noqa: E402
from megavlm.data.device_batch import Batch, context_length, make_batch  # noqa: E402
from megavlm.parallel.state import is_first_stage, process_groups  # noqa: E402
from megavlm.training.build import build_training  # noqa: E402
from megavlm.training.loss import task_mean  # noqa: E402
from megavlm.training.step import train_step  # noqa: E402

SOURCES: list[dict[str, Any]] = [
    {"path": "/captions"},
    {"path": "/synthetic", "task": "ocr", "loss_weight": 3},
    {"path": "/rare", "loss_weight": 0.25},
    {"path": "/scanned", "task": "ocr", "loss_weight": 3},
    {"path": "/never"},
]
PACKS = 8

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp4": {},
    "dp4, overlapped": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    "tp2-dp2, full recompute": {**TP2, "recompute_granularity": "full"},
    "tp2-pp2-sp": {**TP2, **PP2, "sequence_parallel": True},
    "pp2-dp2": PP2,
    "cp2-pp2": {**PP2, "context_parallel_size": 2},
    "cp4": {"context_parallel_size": 4},
    "pp2-vpp2-dp2": {**PP2, "virtual_pipeline_model_parallel_size": 2},
}


def recipe(kind: str = "task_mean", **parallel: Any) -> Recipe:
    """Return a recipe with four tasks in five data sets."""
    sources = SOURCES if kind == "task_mean" else [{"path": source["path"]} for source in SOURCES]
    return tiny_recipe(
        parallel=parallel,
        loss={"kind": kind},
        data={"train": sources},
        training={"train_steps": 2, "global_batch_size": PACKS, "precision": "fp32"},
    )


def packs(step: int) -> list[tuple[Any, np.ndarray]]:
    """Return the packs of a step: samples of several tasks in each, unevenly.

    Task ``rare`` has a single sample in the first step and none in the second; the third pack teaches nothing. Answers
    of two packs have weights.
    """
    rng = np.random.default_rng(step)
    result = random_packs(PACKS, seed=step)
    for pack, _ in result:
        real = pack.segment_sources >= 0
        pack.segment_sources[real] = rng.choice([0, 1, 3], p=[0.6, 0.3, 0.1], size=real.sum())
    if step == 0:
        result[5][0].segment_sources[0] = 2
    result[2][0].labels[:] = IGNORE_INDEX
    for index in (1, 4):
        result[index][0].loss_weights = rng.choice([0.25, 1.0, 2.0], size=len(result[index][0].labels)).astype("f4")
    return result


def batches(step: int, first: int = 0, every: int = 1) -> list[Batch]:
    """Return every ``every``-th micro-batch of a step."""
    chosen = packs(step)[first::every]
    length, cpu = context_length(pack.cu_seqlens for pack, _ in chosen), torch.device("cpu")
    return [
        make_batch(pack, torch.from_numpy(pixels) if is_first_stage() else None, cpu, length=length)
        for pack, pixels in chosen
    ]


def run(weights: Path, kind: str = "task_mean", **parallel: Any) -> dict[str, list[float]]:
    """Take two steps from ``weights`` (saved first if they are not there) at the layout of the open process groups."""
    chosen = recipe(kind, **parallel)
    training = build_training(chosen, IMAGE_TOKEN)
    if not weights.exists():
        checkpoint.save_weights(weights.parent, training.modules)
    checkpoint.load(weights, modules=training.modules)
    training.optimizer.reload_model_params()
    rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    found: dict[str, list[float]] = {"loss": [], "grad_norm": [], "tokens": []}
    for step in range(2):
        training.scheduler.step(1)
        result = train_step(
            training.chunks,
            training.optimizer,
            batches(step, rank, size),
            len(chosen.data.train),
            tasks=task_mean(chosen),
        )
        found["loss"].append(result.loss)
        found["grad_norm"].append(result.grad_norm or 0.0)
        found["tokens"].append(result.supervised_tokens)
    return found


def main() -> None:
    """Run every layout."""
    results = {}
    for name, parallel in LAYOUTS.items():
        print("layout:", name, flush=True)
        with process_groups(recipe(**parallel).parallel, seed=1):
            results[name] = run(Path(sys.argv[1]), **parallel)
            if dist.get_rank() == 0:
                Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
