"""Times steps of a PP 2 pipeline whose stages take known times; writes the figures of each. Run under torchrun.

A stage sleeps before each forward pass, so that its time hardly depends on what else this machine does; schedule,
communication and model are the real ones. Argument: where rank 0 writes JSON, by case.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from megavlm.parallel.device import prepare_device

prepare_device()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from tiny import IMAGE_TOKEN, random_packs, tiny_recipe  # noqa: E402
from torch._C._distributed_c10d import ProcessGroup, Work  # noqa: E402

from megavlm.data.device_batch import make_batch  # noqa: E402
from megavlm.parallel.state import is_first_stage, process_groups  # noqa: E402
from megavlm.training.build import build_training  # noqa: E402
from megavlm.training.step import train_step  # noqa: E402
from megavlm.training.timing import StepTiming  # noqa: E402

STEPS, MOST_STEPS = 4, 40
"""Of each case at least; and at most, where none was quiet (the machine kept a rank from its core)."""
QUIET = 1.3
"""Times the sleeps of a step without stalls that a quiet one may take."""
CASES = {"even-2": (2, (0.06, 0.06)), "even-8": (8, (0.06, 0.06)), "second-slow": (6, (0.02, 0.08))}
"""Micro-batches, and how long each stage sleeps in a forward pass."""


def main() -> None:
    """Run every case."""
    recipe = tiny_recipe(parallel={"pipeline_model_parallel_size": 2}, logging={"timing_interval": 1})
    plain = {**vars(Work), **vars(ProcessGroup)}
    found: dict[str, list[dict[str, float | str]]] = {}
    with process_groups(recipe.parallel, recipe.training.seed):
        training = build_training(recipe, IMAGE_TOKEN)
        nap = [0.0]
        training.modules[0].register_forward_pre_hook(lambda *_: time.sleep(nap[0]))
        timing = StepTiming(recipe.logging, training.configs)
        for name, (count, naps) in CASES.items():
            nap[0], found[name] = naps[dist.get_rank()], []
            ideal = (count + 1) * max(naps)
            for step in range(MOST_STEPS):
                dist.barrier()
                start = time.perf_counter()
                timing.begin(step)
                batches = [
                    make_batch(pack, torch.from_numpy(pixels) if is_first_stage() else None, torch.device("cpu"))
                    for pack, pixels in random_packs(count, seed=step)
                ]
                timing.fetched()
                train_step(training.chunks, training.optimizer, batches, num_sources=1)
                timing.end()
                # Of the rank that took longest, as the step's is: on a busy machine they leave a barrier apart.
                wall = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
                dist.all_reduce(wall, dist.ReduceOp.MAX)
                found[name].append({**timing.collect(), "wall": wall.item()})
                if step + 1 >= STEPS and min(one["wall"] for one in found[name]) < QUIET * ideal:
                    break
        assert all(config.timers is None for config in training.configs)
        assert {**vars(Work), **vars(ProcessGroup)} == plain, "torch's own methods are not back in place"
        if dist.get_rank() == 0:
            Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
