"""Pictures of real sizes against equal squares: the tower per patch, and the decoder per picture and megapixel.

The tower is the one of ``vs_native`` (Qwen2.5-VL's, widths divided by 14), forward and backward with its connector, on
packs of pictures of real sizes and on as many patches in squares of 448 pixels, in turns in the same process. The
decoder makes patches of JPEGs in their own resolution, and squares of as many pixels of the same JPEGs. Medians.

``--balance`` measures what packs are worth that are weighed by the tower's cost: the processor time of tower and
connector on every pack, forward and backward (with attention to whole pictures, as Qwen2-VL's), and of the language
model on one, go through a simulated pipeline of two stages.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from megavlm.parallel.device import prepare_device  # noqa: E402

prepare_device()

import native_balance  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from native_balance import PICTURES  # noqa: E402
from PIL import Image  # noqa: E402
from vs_native import BUDGET, recipe_of  # noqa: E402

from megavlm.data.decoders import make_decoder  # noqa: E402
from megavlm.data.images import lay_out  # noqa: E402
from megavlm.data.media import plan_of  # noqa: E402
from megavlm.data.plans_single import SquashPlan  # noqa: E402
from megavlm.models.build import build_model, unwrap  # noqa: E402
from megavlm.models.front import encode  # noqa: E402
from megavlm.parallel.state import process_groups  # noqa: E402
from megavlm.planning.schedule import simulate  # noqa: E402
from megavlm.planning.weighing import Weigher  # noqa: E402
from megavlm.training.build import build_training  # noqa: E402
from megavlm.training.order import StepOrder  # noqa: E402
from megavlm.training.step import run_batches  # noqa: E402

SQUARE = (1, 32, 32)
"""A picture of 448 x 448 pixels in patches of 14."""


def sizes(count: int) -> list[tuple[int, int]]:
    """Return widths and heights of pictures of real sizes."""
    rng = np.random.default_rng(0)
    shares = np.array([share for share, *_ in PICTURES]) / sum(share for share, *_ in PICTURES)
    chosen = [PICTURES[rng.choice(len(PICTURES), p=shares)][1:] for _ in range(count)]
    return [(int(w * rng.uniform(0.8, 1.2)), int(h * rng.uniform(0.8, 1.2))) for w, h in chosen]


def in_turns(works: dict[str, tuple[Callable[[], Any], float]], rounds: int) -> dict[str, dict[str, float]]:
    """Run each work in each round, after one that is not counted; return medians per unit of each."""
    wall: dict[str, list[float]] = {name: [] for name in works}
    cpu: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, (work, units) in works.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            work()
            if turn:
                wall[name].append((time.perf_counter() - start) / units)
                cpu[name].append((time.process_time() - cpu_start) / units)
    return {
        name: {"seconds": statistics.median(wall[name]), "cpu_seconds": statistics.median(cpu[name])} for name in works
    }


def measure_tower(patches: int, rounds: int) -> dict[str, dict[str, float]]:
    """Encode about ``patches`` patches of pictures of real sizes, and of squares; seconds of a patch."""
    recipe = recipe_of(2048)
    plan = plan_of(recipe.model)
    mixed: list[tuple[int, int, int]] = []
    for size in sizes(1000):
        grid = plan.plan(*size).patches
        assert grid is not None
        if sum(t * h * w for t, h, w in [*mixed, grid]) <= patches:
            mixed.append(grid)
    squares = [SQUARE] * max(1, round(sum(t * h * w for t, h, w in mixed) / 1024))
    with process_groups(recipe.parallel, 1):
        model = unwrap(build_model(recipe, 1)[0])

        def run(grids: list[tuple[int, int, int]]) -> tuple[Callable[[], None], float]:
            count = sum(t * h * w for t, h, w in grids)
            pixels = torch.randint(0, 256, (count, recipe.model.vision.patch_values), dtype=torch.uint8)
            grid = torch.tensor(grids)

            def work() -> None:
                encode(model.vision, model.connector, pixels, grid, trains_vision=True).square().mean().backward()
                model.zero_grad()

            return work, count

        return in_turns({"mixed": run(mixed), "squares": run(squares)}, rounds)


def pictures(count: int) -> list[bytes]:
    """Return JPEGs as smooth and as noisy as photographs."""
    rng, found = np.random.default_rng(1), []
    for width, height in sizes(count):
        y, x = np.mgrid[0:height, 0:width]
        waves = [np.sin(x * rng.uniform(0.01, 0.1) + y * rng.uniform(0.01, 0.1)) for _ in range(3)]
        pixels = 128 + 90 * np.stack(waves, -1) + rng.normal(0, 6, (height, width, 3))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
        found.append(buffer.getvalue())
    return found


def measure_decoder(count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Decode pictures in their own resolution within the budget, and as squares of about as many pixels each."""
    files, plan = pictures(count), plan_of(recipe_of(2048).model)
    decoder = make_decoder("auto")
    layouts = lay_out(files, plan)
    mean = sum(one.patches[1] * one.patches[2] for one in layouts if one.patches) * 14**2 / count
    side = int(mean**0.5) // 14 * 14
    square = SquashPlan(side, 1)
    return in_turns(
        {
            "native": (lambda: decoder.decode(files, plan, layouts), count),
            f"squares of {side}": (lambda: decoder.decode(files, square, None), count),
        },
        rounds,
    )


def measure_balance(steps: int) -> dict[str, dict[str, float]]:
    """Return the bubble and the spread of the first stage, of measured times, for each way of packing."""
    case = native_balance.Case("", 1, 2, 2, 4, "native", 2048)
    recipe = recipe_of(case.length)
    vision = dataclasses.replace(recipe.model.vision, window_size=None, full_attention_layers=())
    image = dataclasses.replace(recipe.model.image, max_pixels=1024 * 784)
    parallel = dataclasses.replace(recipe.parallel, pipeline_model_parallel_size=2)
    whole = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, vision=vision, image=image))
    cut = dataclasses.replace(whole, parallel=parallel)
    plan, weigher, order = plan_of(whole.model), Weigher(whole), StepOrder(cut)
    count = steps * case.microbatches
    packed = {
        "length alone": native_balance.pack(case, plan, count, None),
        "counted": native_balance.pack(case, plan, count, lambda sample: len(sample.grids)),
        "weighed": native_balance.pack(
            case, plan, count, lambda sample: weigher([native_balance.Layout(grid) for grid in sample.grids])
        ),
    }
    found = {}
    with process_groups(whole.parallel, 1):
        training = build_training(whole, 1)
        (model,) = training.modules
        language = _language_seconds(training, whole)
        # As much of the language model before the border as makes both stages equally long on average.
        for name, packs in packed.items():
            times = [[_tower_seconds(model, grids) for grids in replica] for replica in packs.grids]
            mean = float(np.mean(times))
            first = max((language - mean) / 2, 0.0)
            found[name] = _simulated(case, packs, order, name, times, first, language - first, steps)
    return found


def _tower_seconds(model: Any, grids: list[tuple[int, int, int]]) -> float:
    shown = grids or [(1, 2, 2)]
    pixels = torch.zeros(sum(t * h * w for t, h, w in shown), model.vision.settings.patch_values, dtype=torch.uint8)
    start = time.process_time()
    encode(model.vision, model.connector, pixels, torch.tensor(shown), trains_vision=True).square().mean().backward()
    return time.process_time() - start


def _language_seconds(training: Any, recipe: Any) -> float:
    from megavlm.data.batch import make_pack
    from megavlm.data.device_batch import make_batch
    from megavlm.data.positions import OwnPositions

    length = recipe.data.sequence_length
    tokens = np.arange(length) % 1000 + 2
    pack = make_pack([tokens], length, labels=[tokens], positions=OwnPositions((1,)))
    none = torch.zeros(0, recipe.model.vision.patch_values, dtype=torch.uint8)
    batch = make_batch(pack, none, torch.device("cpu"))
    seconds = []
    for _ in range(2):
        start = time.process_time()
        run_batches(training.chunks, [batch], num_sources=1)
        seconds.append(time.process_time() - start)
    return min(seconds)


def _simulated(
    case: Any, packs: Any, order: Any, name: str, times: list[list[float]], first: float, second: float, steps: int
) -> dict[str, float]:
    total = busy = 0.0
    for step in range(steps):
        slowest = 0.0
        for grids, measured in zip(packs.grids, times, strict=True):
            at = range(step * case.microbatches, (step + 1) * case.microbatches)
            shown, own = [grids[i] for i in at], [measured[i] for i in at]
            orders = {"counted": native_balance.counted_order, "weighed": lambda order, shown: order(shown)}
            own = [own[i] for i in orders[name](order, shown)] if name in orders else own
            forward = [[(first + tower) / 3, second / 3] for tower in own]
            backward = [[2 * one for one in row] for row in forward]
            timeline = simulate(forward, backward, pipeline=2, virtual=None)
            slowest, busy = max(slowest, timeline.total), busy + sum(timeline.busy)
        total += slowest
    spread = np.std(times) / (np.mean(times) + first)
    return {"bubble": 1 - busy / (total * 2 * case.replicas), "spread": float(spread), "padding": packs.padding}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patches", type=int, default=8192, help="patches of a pack")
    parser.add_argument("--pictures", type=int, default=40, help="JPEGs to decode")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each")
    parser.add_argument("--balance", type=int, metavar="STEPS", help="measure packs instead, so many steps of 8")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    if arguments.balance:
        print("| packs | first stage's spread | bubble | padding |\n|---|---|---|---|")
        for name, row in measure_balance(arguments.balance).items():
            print(f"| {name} | {row['spread']:.1%} | {row['bubble']:.1%} | {row['padding']:.2%} |")
        return
    tower = measure_tower(arguments.patches, arguments.rounds)
    decoder = measure_decoder(arguments.pictures, arguments.rounds)
    print(f"1 thread, load {load:.1f} before the start; pictures of at most {BUDGET // 784} tokens; medians.\n")
    print("| what | us of a patch | the same, processor time |\n|---|---|---|")
    for name, row in tower.items():
        print(f"| tower, {name} | {1e6 * row['seconds']:.1f} | {1e6 * row['cpu_seconds']:.1f} |")
    ratio = {key: tower["squares"][key] / tower["mixed"][key] for key in ("seconds", "cpu_seconds")}
    print(f"| mixed as fast as squares | {ratio['seconds']:.2f} | {ratio['cpu_seconds']:.2f} |")
    print("\n| what | pictures/s | pictures/s of processor time |\n|---|---|---|")
    for name, row in decoder.items():
        print(f"| decoder, {name} | {1 / row['seconds']:.1f} | {1 / row['cpu_seconds']:.1f} |")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"tower": tower, "decoder": decoder}, indent=1) + "\n")


if __name__ == "__main__":
    main()
