"""Load a run's checkpoint at another layout, with optimizer and scheduler, and save it again at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megavlm.parallel.device import prepare_device

prepare_device()

from tiny import IMAGE_TOKEN, random_packs, tiny_recipe  # noqa: E402

from megavlm.checkpoint.distributed import load  # noqa: E402
from megavlm.checkpoint.saver import Saver, State  # noqa: E402
from megavlm.data.device_batch import make_batch  # noqa: E402
from megavlm.parallel.device import local_device  # noqa: E402
from megavlm.parallel.state import is_first_stage, process_groups  # noqa: E402
from megavlm.training.build import build_training  # noqa: E402
from megavlm.training.step import train_step  # noqa: E402


def main() -> None:
    """Train three steps and save, or load and save."""
    import torch
    from megatron.core import parallel_state as mpu

    job = json.loads(Path(sys.argv[1]).read_text())
    recipe = tiny_recipe(**job["recipe"])
    with process_groups(recipe.parallel, 1):
        training = build_training(recipe, IMAGE_TOKEN)
        if job["load"] is None:
            rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
            for step in range(3):
                mine = random_packs(recipe.training.global_batch_size, seed=step)[rank::size]
                batches = [
                    make_batch(pack, torch.from_numpy(pixels) if is_first_stage() else None, local_device())
                    for pack, pixels in mine
                ]
                training.scheduler.step(1)
                train_step(training.chunks, training.optimizer, batches, num_sources=1)
        else:
            load(
                Path(job["load"]), modules=training.modules, optimizer=training.optimizer, scheduler=training.scheduler
            )
        with training.settled():
            state = State(training.modules, training.optimizer, training.scheduler, run={"step": 3})
            Saver(Path(job["save"]), keep=1).save(state)


if __name__ == "__main__":
    main()
