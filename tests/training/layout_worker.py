"""Trains 3 steps at one layout from given weights; writes losses and gradient norms. Run under torchrun.

Arguments: JSON file with ``recipe`` (branches for tests.tiny), ``weights`` (checkpoint to start from, or where to
save the initial weights if it does not exist), ``out``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megavlm.parallel.device import prepare_device

prepare_device()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from tiny import IMAGE_TOKEN, random_packs, tiny_recipe  # noqa: E402

from megavlm.checkpoint import distributed as checkpoint  # noqa: E402
from megavlm.data.device_batch import make_batch  # noqa: E402
from megavlm.parallel.state import is_first_stage, process_groups  # noqa: E402
from megavlm.training.build import build_training  # noqa: E402
from megavlm.training.step import train_step  # noqa: E402


def main() -> None:
    """Train and write."""
    job = json.loads(Path(sys.argv[1]).read_text())
    recipe = tiny_recipe(**job["recipe"])
    with process_groups(recipe.parallel, recipe.training.seed):
        training = build_training(recipe, IMAGE_TOKEN)
        weights = Path(job["weights"])
        if not weights.exists():
            checkpoint.save_weights(weights.parent, training.modules)
        checkpoint.load(weights, modules=training.modules)
        training.optimizer.reload_model_params()
        data_rank, data_size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        count = recipe.training.global_batch_size
        losses, norms = [], []
        for step in range(recipe.training.train_steps):
            mine = random_packs(count, seed=step)[data_rank::data_size]
            batches = [
                make_batch(pack, torch.from_numpy(pixels) if is_first_stage() else None, torch.device("cpu"))
                for pack, pixels in mine
            ]
            training.scheduler.step(1)
            result = train_step(training.chunks, training.optimizer, batches, num_sources=1)
            losses.append(result.loss)
            norms.append(result.grad_norm)
        if dist.get_rank() == 0:
            Path(job["out"]).write_text(json.dumps({"loss": losses, "grad_norm": norms}))


if __name__ == "__main__":
    main()
