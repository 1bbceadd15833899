"""What timing a step costs it: steps with and without marks in turn, in the same run.

``torchrun --nproc-per-node 2 benchmarks/step_timing.py --tensor 2`` (or ``--pipeline 2``, or one process). Prints one
row of a Markdown table for rank 0: median wall-clock and processor milliseconds of a step without and with timing, the
moments that were taken, what one costs, and their cost in all. Beside other work only the last figures are worth much.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from megavlm.parallel.device import prepare_device  # noqa: E402

prepare_device()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from tiny import IMAGE_TOKEN, random_packs, tiny_recipe  # noqa: E402

from megavlm.data.device_batch import make_batch  # noqa: E402
from megavlm.parallel.device import local_device, synchronize  # noqa: E402
from megavlm.parallel.state import is_first_stage, process_groups  # noqa: E402
from megavlm.parallel.stopwatch import Stopwatch  # noqa: E402
from megavlm.training.build import build_training  # noqa: E402
from megavlm.training.step import train_step  # noqa: E402


class _Counted(Stopwatch):
    """Knows how many moments the last step took."""

    moments = 0

    def stop(self, wait: Any) -> Any:
        self.moments = 3 + 2 * sum(map(len, self._waits.values())) + 2 * sum(len(m.spans) for m in self._marks.values())
        return super().stop(wait)


def _fixed_cost(stopwatch: Stopwatch) -> float:
    """Seconds to put all marks in place and to take them away again."""
    start = time.perf_counter()
    for _ in range(200):
        stopwatch.start()
        stopwatch.cancel()
    return (time.perf_counter() - start) / 200


def _cost_of_a_moment(stopwatch: Stopwatch) -> float:
    """Seconds that one half of a mark takes, with Megatron-Core's way of calling it."""
    stopwatch.start()
    start = time.perf_counter()
    for _ in range(5000):
        stopwatch("forward-compute", log_level=2).start()
        stopwatch("forward-compute").stop()
    seconds = (time.perf_counter() - start) / 10000
    stopwatch.cancel()
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=60)
    args = parser.parse_args()
    sizes = {"tensor_model_parallel_size": args.tensor, "pipeline_model_parallel_size": args.pipeline}
    recipe = tiny_recipe(parallel=sizes, training={"global_batch_size": args.micro_batches})
    wall: dict[bool, list[float]] = {False: [], True: []}
    work: dict[bool, list[float]] = {False: [], True: []}
    with process_groups(recipe.parallel, 1):
        training = build_training(recipe, IMAGE_TOKEN)
        stopwatch = _Counted(training.configs)
        batches = [
            make_batch(pack, torch.from_numpy(pixels) if is_first_stage() else None, local_device())
            for pack, pixels in random_packs(args.micro_batches)
        ]
        for i in range(2 * args.pairs + 4):
            timed = i % 4 in (1, 2)  # off, on, on, off: a drift of the machine hits both alike
            dist.barrier()
            start, worked = time.perf_counter(), time.process_time()
            if timed:
                stopwatch.start()
            stopwatch.fetched()
            train_step(training.chunks, training.optimizer, batches, num_sources=1)
            if timed:
                stopwatch.stop(synchronize)
            synchronize()
            if i >= 4:
                wall[timed].append(time.perf_counter() - start)
                work[timed].append(time.process_time() - worked)
        fixed, moment = _fixed_cost(stopwatch), _cost_of_a_moment(stopwatch)
        if dist.get_rank() == 0:
            off, on = statistics.median(wall[False]), statistics.median(wall[True])
            cost = fixed + stopwatch.moments * moment
            layout = (
                f"TP {args.tensor} x PP {args.pipeline} x {dist.get_world_size()} ranks, load {os.getloadavg()[0]:.0f}"
            )
            print(
                f"| {layout} | {1e3 * off:.1f} | {1e3 * on:.1f} | {1e3 * statistics.median(work[False]):.1f} |"
                f" {1e3 * statistics.median(work[True]):.1f} | {stopwatch.moments} | {1e6 * moment:.2f} us |"
                f" {1e3 * cost:.2f} | {cost / off:.2%} |"
            )


if __name__ == "__main__":
    main()
