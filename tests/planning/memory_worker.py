"""Builds real models at several layouts and writes what they allocate. Run under torchrun.

Arguments: a JSON file with a list of recipes (branches for tests.tiny), and the file to write: for each recipe the
mean bytes of weights, gradients and optimizer per rank of each pipeline stage, what autograd keeps of one micro-batch
there, how many images that had, and the operations that torch counts in its forward pass (of recipes with
``"count": true`` beside their branches, whose pipeline is not virtual).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megavlm.parallel.device import prepare_device

prepare_device()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from saved_tensors import saved_tensors  # noqa: E402
from tiny import IMAGE_TOKEN, random_packs, tiny_recipe  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from megavlm.data.device_batch import make_batch  # noqa: E402
from megavlm.parallel.state import is_first_stage, process_groups  # noqa: E402
from megavlm.training.build import TrainingModel, build_training  # noqa: E402
from megavlm.training.step import run_batches, train_step  # noqa: E402


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes behind ``tensors``, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def optimizer_tensors(training: TrainingModel) -> Iterable[torch.Tensor]:
    """Yield master weights and moments."""
    for one in getattr(training.optimizer, "chained_optimizers", [training.optimizer]):
        for name in ("shard_fp32_from_float16_groups", "fp32_from_float16_groups"):
            for group in getattr(one, name, []):
                yield from group
        for state in one.optimizer.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value))


def measure(branches: dict[str, Any], *, count: bool = False) -> list[list[float]]:
    """Take one step, of as few micro-batches as the schedule takes; return the means per rank of each stage."""
    recipe = tiny_recipe(**branches)
    with process_groups(recipe.parallel, recipe.training.seed):
        training = build_training(recipe, IMAGE_TOKEN)
        pipeline = mpu.get_pipeline_model_parallel_world_size()
        few = pipeline if len(training.chunks) > 1 else 1  # the interleaved schedule takes no fewer
        replicas = mpu.get_data_parallel_world_size()
        mine = random_packs(few * replicas)[mpu.get_data_parallel_rank() :: replicas]
        batches = [
            make_batch(pack, torch.from_numpy(pixels) if is_first_stage() else None, torch.device("cpu"))
            for pack, pixels in mine
        ]
        with saved_tensors(p for chunk in training.chunks for p in chunk.parameters()) as saved:
            run_batches(training.chunks, batches, num_sources=1)
        # Attention as plain matrix products: torch does not count its fused form on CPUs.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            if count:
                run_batches(training.chunks, batches, num_sources=1, forward_only=True)
        train_step(training.chunks, training.optimizer, batches, num_sources=1)
        own = torch.zeros(pipeline, 7, dtype=torch.float64)
        own[mpu.get_pipeline_model_parallel_rank()] = torch.tensor(
            [
                storage_bytes(p for chunk in training.chunks for p in chunk.parameters()),
                storage_bytes(
                    buffer.grad_data
                    for chunk in training.chunks
                    for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
                ),
                storage_bytes(optimizer_tensors(training)),
                saved.bytes / few,
                batches[0].num_images,
                counter.get_total_flops() / few,
                1,
            ],
            dtype=torch.float64,
        )
        dist.all_reduce(own)
        return (own[:, :-1] / own[:, -1:]).tolist()


def main() -> None:
    """Measure one recipe after the other."""
    results = [measure(**job) for job in json.loads(Path(sys.argv[1]).read_text())]
    if os.environ["RANK"] == "0":
        Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
