"""Step time with the next step's pictures encoded during a step, over one phase after the other; on CPUs, PP 2.

``python benchmarks/vision_ahead.py --out FILE`` starts two ranks, one on each of two cores, with the models, packs and
measure of ``vision_placement.py``; tower and connector are frozen. Either takes the same six steps in turn, of which
the middle four count: with ``parallel.vision_ahead`` the first finds nothing ready, and the last encodes nothing ahead.
*Tower* is the mean of the ranks' seconds in it where nothing is ahead; what waits in the pipeline, and can be filled,
is about a step's other seconds by micro-batches + 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import vision_placement as base  # noqa: E402

SHARES, MICROBATCHES, STEPS = (0.2, 0.4), (2, 8), 6


def frozen(ahead: bool) -> Any:
    """Return what makes a recipe of ``vision_placement.py`` one with a frozen tower and connector."""
    made = base.recipe_of

    def recipe_of(tower_layers: int, first: int | None, placement: str) -> Any:
        recipe = made(tower_layers, first, placement)
        modules = recipe.modules
        parts = {part: dataclasses.replace(getattr(modules, part), freeze=True) for part in ("vision", "connector")}
        return dataclasses.replace(
            recipe,
            modules=dataclasses.replace(modules, **parts),
            parallel=dataclasses.replace(recipe.parallel, vision_ahead=ahead),
        )

    return recipe_of


def run_of(side: Any, steps: list[list[Any]], ahead: bool) -> float:
    """Return the seconds of a step, the first and the last of these not counted."""
    start = 0.0
    for number, batches in enumerate(steps[:-1]):
        if number == 1:
            start = time.perf_counter()  # all ranks are here: the step before ended with a collective
        if ahead:
            side.training.vision.encode_ahead(steps[number + 1])
        side.step(batches)
    seconds = time.perf_counter() - start
    side.step(steps[-1])
    return seconds / (len(steps) - 2)


def case(share: float, mix: str, count: int, rounds: int) -> dict[str, Any]:
    """Measure one tower, mix and number of micro-batches."""
    base.MICROBATCHES = count
    steps = base.images_of(mix, STEPS)
    images = statistics.fmean(n for step in steps for n in step)
    depth = base.tower_layers(share, images)
    made, sides = base.recipe_of, []
    for ahead in (False, True):
        base.recipe_of = frozen(ahead)
        sides.append(base.Side(depth, None, "all_ranks"))
    ratios, seconds = [], []
    for turn in range(rounds + 1):
        batches = [side.batches(counts, turn * STEPS + i) for i, counts in enumerate(steps) for side in sides]
        taken = {}
        for k in (0, 1) if turn % 2 else (1, 0):
            taken[k] = run_of(sides[k], batches[k::2], bool(k))
        if turn:
            ratios.append(taken[1] / taken[0])
            seconds.append((taken[0], taken[1]))
    base.recipe_of = made
    return {
        "share": base.tower_share(sides[0].recipe, images), "mix": mix, "microbatches": count, "tower_layers": depth,
        "ratio": statistics.median(ratios), "ratios": ratios, "tower": statistics.median(sides[0].tower),
        "seconds": [statistics.median(column) for column in zip(*seconds, strict=True)],
    }  # fmt: skip


def work(args: argparse.Namespace) -> None:
    """Be one of the ranks."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"]) % len(cores)]})
    from megavlm.parallel.device import prepare_device

    prepare_device()
    import torch.distributed as dist

    from megavlm.parallel.state import process_groups

    with process_groups(base.recipe_of(1, None, "all_ranks").parallel, 1):
        rows = [case(share, "multi-image", count, args.rounds) for share in SHARES for count in MICROBATCHES]
        if dist.get_rank() == 0:
            args.out.write_text(json.dumps({"cases": rows}, indent=2) + "\n", encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """Return the Markdown of a result."""
    lines = [
        f"Command: `{result['command']}` ({result['seconds']:.0f} s, load {result['load']:.1f} at the start)", "",
        "| tower | micro-batches | tower's seconds | one after the other | ahead | ratio | least, most |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in result["cases"]:
        plain, ahead = row["seconds"]
        lines.append(
            f"| {row['share']:.0%} | {row['microbatches']} | {row['tower']:.2f} s | {plain:.2f} s | {ahead:.2f} s |"
            f" {row['ratio']:.3f} | {min(row['ratios']):.3f}, {max(row['ratios']):.3f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Start the ranks, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--rounds", type=int, default=5, help="times that either takes its steps (default 5)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return 0
    result = base.measured(Path(__file__), args.out)
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
