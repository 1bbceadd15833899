"""``megavlm plan``: which layout to train a recipe with on a number of GPUs, and what that will cost."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from megavlm.checkpoint.hf.directory import expand_recipe
from megavlm.config.checks import check_recipe
from megavlm.config.errors import RecipeError
from megavlm.config.load import load_recipe
from megavlm.config.schema import Recipe
from megavlm.planning.gpus import CUSTOM, DEFAULT, GIB, GPUS, GivenGpu, Gpu, choose_gpu
from megavlm.planning.launch import launch_line
from megavlm.planning.layout import with_parallel, with_placement
from megavlm.planning.measured import read_rates
from megavlm.planning.picture import check_picture, draw
from megavlm.planning.placement import AUTO, FIRST, of_search
from megavlm.planning.report import PlanPage, as_json, as_text, overrides_file
from megavlm.planning.search import Plan, evaluate, search
from megavlm.planning.timing import Timer
from megavlm.planning.workload import PICTURE, Workload, assume_workload

INTERMIXED = True
"""Overrides may stand between the options."""

_DRAWN = 12
"""Micro-batches that a picture shows at most; with deep pipelines three for each stage."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``megavlm plan``."""
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, or a shipped recipe")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="a key of the recipe to set")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs of the job")
    parser.add_argument(
        "--gpu",
        metavar="KIND",
        help=f"kind of GPU (default {DEFAULT}, or what was measured): {', '.join(GPUS)}, {CUSTOM}",
    )
    measured = (
        "rates of products, attention and copies that make gpu-check measured on one GPU (its .json), in place of"
    )
    parser.add_argument("--measured", type=Path, metavar="FILE", help=f"{measured} assumed efficiencies")
    given = parser.add_argument_group("the GPU's figures, in place of the table's (--gpu custom has none)")
    given.add_argument("--gpu-memory", type=float, metavar="GIB", help="memory that a process sees")
    given.add_argument("--gpu-tflops", type=float, metavar="N", help="dense bf16 peak")
    given.add_argument("--gpu-fp8-tflops", type=float, metavar="N", help="dense FP8 peak")
    given.add_argument("--gpu-bandwidth", type=float, metavar="GB/S", help="memory bandwidth")
    given.add_argument("--gpu-nvlink", type=float, metavar="GB/S", help="between GPUs of a node, in one direction")
    given.add_argument(
        "--gpu-network", type=float, metavar="GB/S", help="between nodes, a GPU's share, in one direction"
    )
    parser.add_argument("--images-per-pack", type=float, metavar="X", help="images of a pack on average (else assumed)")
    parser.add_argument(
        "--picture-size",
        metavar="WxH",
        help="width and height of the average picture, where an image plan's tokens depend on it (default 1024x768)",
    )
    parser.add_argument("--samples-per-pack", type=float, metavar="X", help="samples of a pack (else one per image)")
    parser.add_argument("--list", type=int, default=8, metavar="N", help="layouts to list (default 8)")
    parser.add_argument("--json", action="store_true", help="print JSON: bytes, seconds, shares from 0 to 1")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write overrides for megavlm train --overrides FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the pipeline schedule (.png or .svg)")


def run(args: argparse.Namespace) -> int:
    """Plan and print.

    Raises:
        RecipeError: wrong input, or no layout fits.
    """
    rates = None if args.measured is None else read_rates(args.measured)
    given = GivenGpu(
        args.gpu_memory, args.gpu_tflops, args.gpu_fp8_tflops, args.gpu_bandwidth, args.gpu_nvlink, args.gpu_network
    )
    gpu = choose_gpu(args.gpu, given, rates)
    for name in ("gpus", "list"):
        if getattr(args, name) < 1:
            raise RecipeError(f"--{name}: {getattr(args, name)} is not a positive number; correct it")
    for path in (args.write, args.picture):
        if path is not None and not path.parent.is_dir():
            raise RecipeError(f"{path}: no directory {str(path.parent)!r}; make it, or correct the path")
    if args.picture is not None:
        check_picture(args.picture)
    recipe = load_recipe(args.recipe, args.overrides, expand_recipe)
    workload = assume_workload(
        recipe, args.images_per_pack, args.samples_per_pack, picture=_picture_size(args.picture_size)
    )
    asked, auto = recipe, recipe.parallel.vision_placement == AUTO
    if auto:
        recipe = with_placement(asked, FIRST)
    found = search(recipe, args.gpus, gpu, workload)
    placements = of_search(asked, found, args.gpus, gpu, workload)
    if auto and placements.better != FIRST:
        assert isinstance(placements.all_ranks, Plan)
        shards = placements.all_ranks.recipe.parallel.vision_shards
        recipe = with_parallel(with_placement(asked, placements.better), vision_shards=shards)
        found = search(recipe, args.gpus, gpu, workload)
    own = _own(recipe, args.gpus, gpu, workload)
    if not found.plans:
        lines = [f"TP {refusal.tensor} x PP {refusal.pipeline}: {refusal.reason}" for refusal in found.refusals]
        raise RecipeError.of([f"--gpus: no layout of {args.recipe} works on {args.gpus} x {gpu.name}", *lines])
    command = launch_line(found.plans[0], asked, args.recipe, args.overrides, args.write)
    report = PlanPage(found, own, gpu, workload, args.list, command, placements)
    page = as_json(report) if args.json else as_text(report)
    sys.stdout.write(f"{page if isinstance(page, str) else json.dumps(page, indent=2)}\n")
    if args.write is not None:
        args.write.write_text(overrides_file(found.plans[0], gpu, args.recipe), encoding="utf-8")
    if args.picture is not None:
        draw_plan(found.plans[0], gpu, workload, args.picture)
    return 0


def _picture_size(text: str | None) -> tuple[int, int]:
    """Return width and height.

    Raises:
        RecipeError: it is no size.
    """
    if text is None:
        return PICTURE
    found = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
    if found is None:
        raise RecipeError(f"--picture-size: {text!r} is no size; give width and height as in 1024x768")
    return int(found[1]), int(found[2])


def _own(recipe: Recipe, gpus: int, gpu: Gpu, workload: Workload) -> Plan | str:
    """Return what the recipe's own layout gives, or why it does not work."""
    try:
        check_recipe(recipe, gpus)
    except RecipeError as error:
        return str(error).splitlines()[0]
    plan = evaluate(recipe, gpus, gpu, workload)
    if plan.fullest <= gpu.memory_bytes:
        return plan
    refused = f"it does not fit: a stage needs {plan.fullest / GIB:.1f} GiB of {gpu.memory_bytes / GIB:.1f}"
    if recipe.parallel.recompute_granularity == "full":
        return refused
    leaner = evaluate(with_parallel(recipe, recompute_granularity="full"), gpus, gpu, workload)
    if leaner.fullest > gpu.memory_bytes:
        return f"{refused}; with parallel.recompute_granularity=full, {leaner.fullest / GIB:.1f}"
    return (
        f"{refused}; with parallel.recompute_granularity=full it needs {leaner.fullest / GIB:.1f} and"
        f" {leaner.time.step:.3g} s a step"
    )


def draw_plan(plan: Plan, gpu: Gpu, workload: Workload, path: Path) -> None:
    """Draw the schedule of a plan, of a few micro-batches where a step has many."""
    layout = plan.layout
    timer = Timer(plan.recipe, layout, gpu, workload)
    wanted = max(_DRAWN, 3 * layout.pipeline)
    shown = min(layout.microbatches, wanted - wanted % layout.pipeline)
    line = timer.timeline(timer.costs(), shown)
    virtual = f" x VPP {layout.virtual}" if layout.virtual else ""
    draw(
        line,
        f"TP {layout.tensor} x PP {layout.pipeline}{virtual} x DP {layout.data} on {layout.gpus} x {gpu.name},"
        f" predicted: {shown} of {layout.microbatches} micro-batches, bubble {100 * line.bubble:.1f} %"
        f" ({100 * plan.time.bubble:.1f} % of the whole step)",
        path,
    )
