"""Step time with tower and connector on all ranks, over the first stage at its best measured split; on CPUs, PP 2.

``python benchmarks/vision_placement.py --out FILE`` starts two ranks, one on each of two cores. For towers of 40, 50
and 60 % of the operations, and two mixes (``mixes.py``, all lengths divided by 10): the split of the language layers
with which the first stage is fastest is measured first; then steps of either placement in turn, on the same packs. A
ratio is of neighbouring steps, and the median of them is what is shown.

*Efficiency* is the least that a step could take over what it takes: the pipeline with ready features, measured, and the
tower's seconds spread evenly over the ranks. *Predicted* is the same ratio from operations alone, as the planner
simulates it: every operation equally fast.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

RANKS, LAYERS, MICROBATCHES, LENGTH, QUERIES = 2, 8, 8, 208, 25
SHARES = (0.4, 0.5, 0.6)
MIXES = ("multi-image", "captions")
FIRSTS = (1, 2, 3, 4)
IMAGE_TOKEN = 500


def recipe_of(tower_layers: int, first: int | None, placement: str) -> Any:
    """Return the run: a small model whose tower has so many layers."""
    from pydantic import TypeAdapter

    from megavlm.config.schema import Recipe
    from megavlm.families.presets import expand_presets

    tree = {
        "output_dir": "unused",
        "model": {
            "preset": "tiny",
            "vision": {"image_size": 112, "patch_size": 14, "hidden_size": 192, "num_layers": tower_layers}
            | {"ffn_hidden_size": 512, "num_attention_heads": 4, "positional_grid": 8},
            "connector": {"num_queries": QUERIES, "head_dim": 32},
            "language": {"hidden_size": 192, "ffn_hidden_size": 512, "num_layers": LAYERS, "num_attention_heads": 4}
            | {"num_query_groups": 4, "kv_channels": 48},
        },
        "parallel": {"pipeline_model_parallel_size": RANKS, "vision_placement": placement}
        | {"num_layers_in_first_pipeline_stage": first},
        "data": {"train": [{"path": "unused"}], "tokenizer": "unused", "sequence_length": LENGTH},
        "optimizer": {"lr": 1e-4},
        "training": {"train_steps": 1000, "global_batch_size": MICROBATCHES, "precision": "fp32"},
    }
    return TypeAdapter(Recipe).validate_python(expand_presets(tree))


def images_of(mix: str, steps: int) -> list[list[int]]:
    """Return the images of the packs of each step, as the packer makes them at full scale."""
    from pipeline_balance import pack

    found = pack(mix, 1, steps * MICROBATCHES, balanced=True).images[0].tolist()
    return [found[i : i + MICROBATCHES] for i in range(0, len(found), MICROBATCHES)]


def tower_share(recipe: Any, images: float) -> float:
    """Return the tower's and connector's share of the operations of a step, all trained."""
    from megavlm.planning.flops import image_flops, language_flops

    vision = images * sum(image_flops(recipe.model, part, 1) for part in ("vision", "connector"))
    return float(vision / (vision + language_flops(recipe.model.language, LENGTH, LENGTH * LENGTH)))


def tower_layers(share: float, images: float) -> int:
    """Return the depth of the tower that comes nearest to a share of the operations."""
    return min(range(1, 40), key=lambda n: abs(tower_share(recipe_of(n, None, "first_stage"), images) - share))


def predicted(depth: int, first: int, steps: Sequence[Sequence[int]]) -> float:
    """Return the ratio of the two placements' step times from operations alone."""
    from megavlm.planning.schedule import around, simulate
    from megavlm.training.order import StepOrder
    from megavlm.training.spread import PictureSpread

    own, even = recipe_of(depth, first, "first_stage"), recipe_of(depth, None, "all_ranks")
    order, plain, spread = StepOrder(own), StepOrder(even), PictureSpread(even)
    plain._empty = 0.0
    forward, backward = (image for image in plain._image)
    ratios = []
    for images in steps:
        before = order.seconds([images[i] for i in order(images)])
        owners = [owner for pack in spread([[[None] * n for n in images]])[0] for owner in pack]
        counts = [owners.count(rank) for rank in range(RANKS)]
        line = simulate(*plain.work([0] * len(images)), pipeline=RANKS)
        step = around(line, [n * forward for n in counts], [n * backward for n in counts])
        ratios.append(step.total / before)
    return statistics.median(ratios)


class Side:
    """One placement in the worker: its model, and what a step of it takes.

    Args:
        depth: layers of the tower.
        first: language layers of the first stage.
        placement: first_stage or all_ranks.
    """

    def __init__(self, depth: int, first: int | None, placement: str) -> None:
        from megavlm.parallel.stopwatch import Stopwatch
        from megavlm.training.build import build_training
        from megavlm.training.order import StepOrder
        from megavlm.training.spread import PictureSpread

        self.recipe = recipe_of(depth, first, placement)
        self.training = build_training(self.recipe, IMAGE_TOKEN)
        self.spread = None if self.training.vision is None else PictureSpread(self.recipe)
        self.order = StepOrder(self.recipe) if self.spread is None else None
        self.stopwatch = Stopwatch(self.training.configs)
        self.tower: list[float] = []

    def batches(self, images: Sequence[int], seed: int) -> list[Any]:
        """Return the micro-batches of a step, in the order in which this placement runs them."""
        import torch

        from megavlm.data.device_batch import share_packs
        from megavlm.data.read_pack import ReadPack
        from megavlm.parallel.state import is_reader

        made = [random_pack(number, 1000 * seed + i) for i, number in enumerate(images)]
        if self.order is not None:
            made = [made[index] for index in self.order(list(images))]
        read = [ReadPack(pack, torch.from_numpy(pixels)) for pack, pixels in made]
        return share_packs(read if is_reader() else None, len(read), self.spread)

    def step(self, batches: Sequence[Any], *, ready: bool = False) -> float:
        """Take a step; return its seconds on the rank that takes longest. ``ready``: its features are there."""
        import torch
        import torch.distributed as dist

        from megavlm.training.step import train_step

        vision = None if ready else self.training.vision
        dist.barrier()
        start = time.perf_counter()
        self.stopwatch.start()
        self.stopwatch.fetched()
        train_step(self.training.chunks, self.training.optimizer, batches, num_sources=1, vision=vision)
        times = self.stopwatch.stop(lambda: None)
        seconds = torch.tensor([time.perf_counter() - start, times.encode + times.vision_backward], dtype=torch.float64)
        longest, total = seconds.clone(), seconds.clone()
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        dist.all_reduce(total)
        if not ready:
            self.tower.append(float(total[1]) / RANKS)
        return float(longest[0])

    def with_features(self, batches: Sequence[Any]) -> list[Any]:
        """Return the micro-batches as the pipeline gets them, without who would go backward."""
        import torch

        vision = self.training.vision
        with torch.no_grad():
            found = vision.encode(batches, backward=False)
        for batch in found:
            if batch.view_features is not None:
                batch.view_features.requires_grad_()
        return found


def random_pack(images: int, seed: int) -> tuple[Any, Any]:
    """Return a pack of one segment with so many pictures, and their pixels."""
    import numpy as np

    from megavlm.data.batch import IGNORE_INDEX, Pack

    rng = np.random.default_rng(seed)
    tokens, labels = (rng.integers(0, IMAGE_TOKEN, LENGTH) for _ in range(2))
    images = min(images, LENGTH // (QUERIES + 1))
    for number in range(images):
        slots = slice(number * (QUERIES + 1) + 1, (number + 1) * (QUERIES + 1))
        tokens[slots], labels[slots] = IMAGE_TOKEN, IGNORE_INDEX
    pack = Pack(
        tokens=tokens, labels=labels, position_ids=np.arange(LENGTH), cu_seqlens=np.array([0, LENGTH], np.int32),
        segment_sources=np.zeros(1, np.int32), images=[b""] * images, sample_keys=[],
    )  # fmt: skip
    return pack, rng.integers(0, 256, (images, 3, 112, 112), dtype=np.uint8)


def case(share: float, mix: str, pairs: int, tries: int) -> dict[str, Any]:
    """Measure one tower and mix."""
    steps = images_of(mix, pairs + 1)
    images = statistics.fmean(n for step in steps for n in step)
    depth = tower_layers(share, images)
    splits = {}
    for first in FIRSTS:
        side = Side(depth, first, "first_stage")
        # The first of them warms up.
        taken = [side.step(side.batches(steps[i % len(steps)], i)) for i in range(tries + 1)]
        splits[first] = statistics.median(taken[1:])
    best = min(splits, key=splits.__getitem__)
    sides = [Side(depth, best, "first_stage"), Side(depth, None, "all_ranks")]
    ratios, efficiency, seconds = [], [], []
    for i, counts in enumerate(steps):
        batches = [side.batches(counts, i) for side in sides]
        turn = (0, 1) if i % 2 else (1, 0)
        taken = dict(zip(turn, [sides[k].step(batches[k]) for k in turn], strict=True))
        ready = sides[1].step(sides[1].with_features(batches[1]), ready=True)
        if i:
            ratios.append(taken[1] / taken[0])
            efficiency.append((ready + sides[1].tower[-1]) / taken[1])
            seconds.append((taken[0], taken[1]))
    return {
        "share": tower_share(sides[1].recipe, images), "mix": mix, "tower_layers": depth, "images": images,
        "splits": splits, "first": best, "ratio": statistics.median(ratios), "ratios": ratios,
        "seconds": [statistics.median(column) for column in zip(*seconds, strict=True)],
        "efficiency": statistics.median(efficiency), "predicted": predicted(depth, best, steps[1:]),
    }  # fmt: skip


def work(args: argparse.Namespace) -> None:
    """Be one of the ranks."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"]) % len(cores)]})
    from megavlm.parallel.device import prepare_device

    prepare_device()
    import torch.distributed as dist

    from megavlm.parallel.state import process_groups

    recipe = recipe_of(1, None, "first_stage")
    with process_groups(dataclasses.replace(recipe.parallel), 1):
        rows = [case(share, mix, args.pairs, args.tries) for mix in args.mixes for share in args.shares]
        if dist.get_rank() == 0:
            args.out.write_text(json.dumps({"cases": rows}, indent=2) + "\n", encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """Return the Markdown of a result."""
    lines = [
        f"Command: `{result['command']}` ({result['seconds']:.0f} s, load {result['load']:.1f} at the start)", "",
        "| mix | tower | best split | first stage | all ranks | ratio | predicted | efficiency |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in result["cases"]:
        first, every = row["seconds"]
        lines.append(
            f"| {row['mix']} | {row['share']:.0%} | {row['first']} + {LAYERS - row['first']} | {first:.2f} s |"
            f" {every:.2f} s | {row['ratio']:.3f} | {row['predicted']:.3f} | {row['efficiency']:.3f} |"
        )
    return "\n".join(lines)


def measured(script: Path, out: Path) -> dict[str, Any]:
    """Start the ranks of a script with this process's arguments; return what the first of them wrote to ``out``."""
    start, load = time.perf_counter(), os.getloadavg()[0]
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    subprocess.run(
        [*words, str(script), *sys.argv[1:], "--worker"], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    result = json.loads(out.read_text(encoding="utf-8"))
    command = shlex.join(["python", f"benchmarks/{script.name}", *sys.argv[1:]])
    result |= {"command": command, "seconds": time.perf_counter() - start, "load": load}
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return dict(result)


def main() -> int:
    """Start the ranks, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of steps of each case (default 7)")
    parser.add_argument("--tries", type=int, default=2, help="steps of each split that is tried (default 2)")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="the tower's shares of the operations")
    parser.add_argument("--mixes", nargs="+", default=MIXES)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return 0
    result = measured(Path(__file__), args.out)
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
