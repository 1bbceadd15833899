"""Both placements of the tower as ``megavlm plan`` reckons them, at published sizes. Nothing here runs a model.

Rows are those of ``pipeline_balance.py``, and Qwen2.5-VL's at 128 to 1024 GPUs. Each placement has the sizes of the row
and the best of what is left to choose: the first stage's layers, recomputation, whether pictures are encoded again.
*Even* is the first stage without the first of these: as many language layers as every other stage, and the tower. The
second table has the packs of ``mixes.py``, each with pictures of its own, and counts operations alone; a step ends with
its slowest replica.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline_balance import CASES, Case, pack, run_steps

from megavlm.architectures.cost import Pictures, cost_of
from megavlm.config.schema import Recipe
from megavlm.planning.flops import language_flops, passes
from megavlm.planning.gpus import find_gpu
from megavlm.planning.layout import with_parallel
from megavlm.planning.placement import ALL, FIRST, of_layout
from megavlm.planning.schedule import around, simulate
from megavlm.planning.search import Plan
from megavlm.planning.workload import assume_workload
from megavlm.training.order import StepOrder
from megavlm.training.spread import PictureSpread

MORE = {
    f"Qwen2.5-VL {size.upper()}, all trained, {gpus} GPUs": Case(
        f"qwen2_5_vl_{size}", tensor, pipeline, gpus // (tensor * pipeline), microbatches, ()
    )
    for size, tensor, pipeline, gpus, microbatches in (
        ("7b", 2, 4, 128, 16), ("7b", 2, 4, 512, 8), ("7b", 2, 4, 1024, 8), ("72b", 8, 4, 128, 16),
        ("72b", 8, 4, 512, 16), ("72b", 8, 8, 1024, 32),
    )
}  # fmt: skip


def recipe_of(case: Case) -> Recipe:
    """Return the run in bf16."""
    recipe = case.recipe(None)
    training = dataclasses.replace(recipe.training, precision="bf16")
    return dataclasses.replace(recipe, training=training)


def choices(recipe: Recipe, placement: str, *, even: bool = False) -> Iterator[dict[str, Any]]:
    """Yield what may be chosen at the sizes of a row; ``even``: with as many layers on each stage."""
    layers, pipeline = recipe.model.language.num_layers, recipe.parallel.pipeline_model_parallel_size
    firsts = [None] if layers % pipeline == 0 else []
    if not even and (placement == FIRST or not firsts):
        firsts += [n for n in range(1, layers // pipeline + 4) if (layers - n) % (pipeline - 1) == 0]
    for first, recompute, again in itertools.product(
        firsts, (None, "selective", "full"), (False, True) if placement == ALL else (False,)
    ):
        yield {
            "num_layers_in_first_pipeline_stage": first,
            "recompute_granularity": recompute,
            "vision_recompute": again,
            "sequence_parallel": recipe.parallel.tensor_model_parallel_size > 1,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
        }


def best(recipe: Recipe, gpus: int, placement: str, *, even: bool = False) -> Plan | str:
    """Return the fastest choice that fits, or why there is none."""
    found, reason = [], "the layers do not split evenly"
    workload = assume_workload(recipe)
    for values in choices(recipe, placement, even=even):
        chosen = with_parallel(recipe, **values, vision_placement=placement)
        plan = getattr(of_layout(chosen, gpus, find_gpu("h100-80g"), workload), placement)
        if isinstance(plan, str):
            reason = plan
        else:
            found.append(plan)
    return min(found, key=lambda plan: plan.time.step) if found else reason


def tower_share(recipe: Recipe) -> float:
    """Return the share of the operations of a step that tower and connector have."""
    workload = assume_workload(recipe)
    seen = Pictures.alike(workload.views, recipe.model.vision.grid)
    parts = [cost_of(recipe.model, "vision").work(recipe.model.vision, seen).total]
    parts.append(cost_of(recipe.model, "connector").work(recipe.model, seen).total)
    parts.append(language_flops(recipe.model.language, workload.tokens, round(workload.squared_lengths)))
    work = [part * times for part, times in zip(parts, passes(recipe), strict=True)]
    return sum(work[:2]) / sum(work)


def row(name: str, case: Case) -> str:
    """Return a row of the table."""
    recipe, gpus = recipe_of(case), case.tensor * case.pipeline * case.replicas
    plans = [best(recipe, gpus, FIRST, even=True), *(best(recipe, gpus, placement) for placement in (FIRST, ALL))]
    sizes = f"{case.tensor} x {case.pipeline} x {case.virtual or '-'} x {case.replicas}"
    cells = [name, sizes, str(case.microbatches), f"{tower_share(recipe):.0%}"]
    for plan in plans:
        if isinstance(plan, str):
            cells += [plan, "-"]
        else:
            cells += [f"{plan.time.bubble:.1%}", f"{plan.time.step:.3g} s"]
    even, first, every = plans
    for other in (even, first):
        if isinstance(other, Plan) and isinstance(every, Plan):
            cells += [f"{1 - every.time.bubble / other.time.bubble:.0%}" if other.time.bubble else "-"]
            cells += [f"{every.time.step / other.time.step:.3f}"]
        else:
            cells += ["-", "-"]
    cells += ["again" if isinstance(every, Plan) and every.recipe.parallel.vision_recompute else ""]
    return f"| {' | '.join(cells)} |"


def with_packs(name: str, case: Case, mix: str, steps: int) -> str:
    """Return a row of either placement with the packs of a mix, each with its own pictures, from operations alone."""
    packs = pack(mix, case.replicas, steps * case.microbatches, balanced=True)
    first = run_steps(packs, case.best_recipe(float(packs.images.mean())), steps, ordered=True)
    even = case.recipe(None)
    order, spread = StepOrder(even), PictureSpread(with_parallel(even, vision_placement=ALL))
    order._empty = 0.0
    # All work is in units of the tensor-parallel ranks of a stage together; a picture is one rank's.
    forward, backward = (case.tensor * image for image in order._image)
    total, busy = 0.0, 0.0
    for step in range(steps):
        slowest = 0.0
        for images in packs.images[:, step * case.microbatches : (step + 1) * case.microbatches].tolist():
            line = simulate(*order.work([0] * len(images)), pipeline=case.pipeline, virtual=case.virtual)
            owners = [owner for own in spread([[[None] * count for count in images]])[0] for owner in own]
            counts = [owners.count(rank) for rank in range(case.tensor * case.pipeline)]
            most = [max(counts[i : i + case.tensor]) for i in range(0, len(counts), case.tensor)]
            line = around(line, [n * forward for n in most], [n * backward for n in most])
            slowest = max(slowest, line.total)
            encoded = sum(counts) / case.tensor * (forward + backward)
            busy += encoded + sum(op.end - op.start for op in line.ops if op.kind in "FB")
        total += slowest
    bubble = 1 - busy / (total * case.pipeline * case.replicas)
    less = 1 - bubble / first["bubble"]
    ratio = total / steps / first["seconds"]
    return f"| {name} | {mix} | {first['bubble']:.1%} | {bubble:.1%} | {less:.0%} | {ratio:.3f} |"


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="steps of each mix of packs (default 3)")
    arguments = parser.parse_args()
    start = time.perf_counter()
    lines = [
        "| run | TP x PP x VPP x DP | micro-batches | tower | even: bubble | step | first stage: bubble | step |"
        " all ranks: bubble | step | less bubble than even | ratio | than first stage | ratio | encoded |"
    ]
    lines.append("|" + "---|" * 15)
    lines += [row(name, case) for name, case in {**CASES, **MORE}.items()]
    lines += ["", "| run | mix | first stage: bubble | all ranks: bubble | less | ratio |", "|---|---|---|---|---|---|"]
    lines += [with_packs(name, case, mix, arguments.steps) for name, case in CASES.items() for mix in case.mixes]
    print("\n".join(lines))
    print(
        "\nPredicted for h100-80g: `python benchmarks/vision_placement_planned.py`"
        f" ({time.perf_counter() - start:.0f} s)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
