"""What packing and ordering micro-batches for the pipeline saves, against packing on length alone.

The packer and the order are megavlm's own, at full scale, on random mixes of samples (``mixes.py``). How long a step
takes is predicted: operations counted from the model's shapes, Megatron-Core's schedule simulated, all GPUs equally
fast. A step ends when the slowest data-parallel replica ends. Nothing here runs a model.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import native_balance
import numpy as np
from mixes import FULL_SCALE_DESCRIPTIONS, shapes
from pydantic import TypeAdapter

from megavlm.config.schema import Recipe
from megavlm.data.packing import CarryOverPacker
from megavlm.families.presets import expand_presets
from megavlm.planning.schedule import simulate
from megavlm.training.order import StepOrder

SEQUENCE_LENGTH = 2048
BUFFER = 256
SETTLING = 400
"""Packs of each replica that are left out at the start: eight times what the packer's buffer holds."""
FROZEN = {"freeze": True}


@dataclass(frozen=True)
class Case:
    """A training run whose steps are simulated."""

    preset: str
    tensor: int
    pipeline: int
    replicas: int
    microbatches: int
    mixes: tuple[str, ...]
    virtual: int | None = None
    modules: dict[str, Any] = field(default_factory=dict)

    def recipe(self, first: int | None) -> Recipe:
        """Return the run with ``first`` layers in its first stage."""
        tree = {
            "output_dir": "unused",
            "model": {"preset": self.preset},
            "parallel": {
                "tensor_model_parallel_size": self.tensor,
                "pipeline_model_parallel_size": self.pipeline,
                "virtual_pipeline_model_parallel_size": self.virtual,
                "num_layers_in_first_pipeline_stage": first,
            },
            "data": {"train": [{"path": "unused"}], "tokenizer": "unused", "sequence_length": SEQUENCE_LENGTH},
            "modules": self.modules,
            "optimizer": {"lr": 1e-5},
            "training": {"train_steps": 1, "global_batch_size": self.replicas * self.microbatches},
        }
        recipe: Recipe = TypeAdapter(Recipe).validate_python(expand_presets(tree))
        return recipe

    def best_recipe(self, images: float) -> Recipe:
        """Return the run with the first stage's share that is fastest if every pack has ``images`` images."""
        layers = self.recipe(None).model.language.num_layers
        chunks, others = self.virtual or 1, self.pipeline - 1
        firsts = [
            first
            for first in range(chunks, layers, chunks)
            if layers - first >= others * chunks and (layers - first) % (others * chunks) == 0
        ]

        def seconds(recipe: Recipe) -> float:
            order = StepOrder(recipe)
            low, high = order.work([int(images)] * self.microbatches), order.work([int(images) + 1] * self.microbatches)
            part = images % 1
            forward, backward = (
                [[a + part * (b - a) for a, b in zip(*rows, strict=True)] for rows in zip(x, y, strict=True)]
                for x, y in zip(low, high, strict=True)
            )
            return simulate(forward, backward, pipeline=self.pipeline, virtual=self.virtual).total

        return min((self.recipe(first) for first in firsts), key=seconds)


CASES = {
    "14B SFT, tower frozen, 128 GPUs": Case(
        "codefuse_vl_14b", 4, 2, 16, 8, ("llava-like", "multi-image", "long text"), modules={"vision": FROZEN}
    ),
    "14B SFT, tower frozen, 256 GPUs": Case(
        "codefuse_vl_14b", 4, 4, 16, 32, ("llava-like", "multi-image", "long text"), modules={"vision": FROZEN}
    ),
    "14B SFT, tower frozen, 1024 GPUs": Case(
        "codefuse_vl_14b", 4, 4, 64, 8, ("llava-like", "multi-image", "long text"), modules={"vision": FROZEN}
    ),
    "14B SFT, tower frozen, interleaved, 256 GPUs": Case(
        "codefuse_vl_14b", 4, 4, 16, 32, ("llava-like", "multi-image"), virtual=2, modules={"vision": FROZEN}
    ),
    "14B alignment, connector alone, 128 GPUs": Case(
        "codefuse_vl_14b", 4, 2, 16, 32, ("captions", "llava-like"), modules={"vision": FROZEN, "language": FROZEN}
    ),
    "7B multi-task, all trained, 512 GPUs": Case("qwen_vl_7b", 4, 2, 64, 64, ("qwen-vl stage 2",)),
    "7B multi-task, all trained, 512 GPUs, small batch": Case(
        "qwen_vl_7b", 4, 2, 64, 8, ("qwen-vl stage 2", "multi-image")
    ),
}
WAYS = {
    "length": (False, False),
    "ordered": (False, True),
    "balanced": (True, False),
    "both": (True, True),
}
"""Whether packs are balanced, and whether steps are ordered."""


@dataclass(frozen=True)
class Packs:
    """The packs of all replicas."""

    images: np.ndarray[Any, Any]
    """[replica, pack] images."""
    padding: float
    """Share of the positions."""
    seconds: float
    """Time to choose one pack."""


def pack(mix: str, replicas: int, count: int, *, balanced: bool) -> Packs:
    """Pack ``count`` packs for each replica, each from its own stream of samples."""
    images, tokens, seconds = np.zeros((replicas, count), int), 0, 0.0
    for replica in range(replicas):
        stream = shapes(mix, seed=replica)
        packer: CarryOverPacker[_Shape] = CarryOverPacker(SEQUENCE_LENGTH, BUFFER, _images if balanced else None)
        made = -SETTLING
        while made < count:
            shape = _Shape(*next(stream))
            start = time.perf_counter()
            chosen = packer.add(shape)
            seconds += time.perf_counter() - start
            if chosen:
                if made >= 0:
                    images[replica, made] = sum(map(_images, chosen))
                    tokens += sum(map(len, chosen))
                made += 1
    positions = replicas * count * SEQUENCE_LENGTH
    return Packs(images, 1 - tokens / positions, seconds / (replicas * (count + SETTLING)))


@dataclass(frozen=True)
class _Shape:
    tokens: int
    images: int

    def __len__(self) -> int:
        return self.tokens


def _images(shape: _Shape) -> int:
    return shape.images


def run_steps(packs: Packs, recipe: Recipe, steps: int, *, ordered: bool) -> dict[str, float]:
    """Simulate ``steps`` steps.

    Returns:
        ``seconds`` of a step, in 1e12 operations of one rank; ``bubble``: share of all ranks' time in which they wait
        for each other, for the slowest replica at the end of the step included. Two ways of packing do not put the
        same samples into so few steps, so bubbles compare better than seconds.
    """
    order, total, busy, pipeline = StepOrder(recipe), 0.0, 0.0, recipe.parallel.pipeline_model_parallel_size
    per_step = packs.images.shape[1] // steps
    for step in range(steps):
        slowest = 0.0
        for replica in packs.images[:, step * per_step : (step + 1) * per_step].tolist():
            chosen = [replica[index] for index in order(replica)] if ordered else replica
            virtual = recipe.parallel.virtual_pipeline_model_parallel_size
            timeline = simulate(*order.work(chosen), pipeline=pipeline, virtual=virtual)
            slowest = max(slowest, timeline.total)
            busy += sum(timeline.busy)
        total += slowest
    return {"seconds": total / steps, "bubble": 1 - busy / (total * pipeline * len(packs.images))}


def first_stage(packs: Packs, recipe: Recipe) -> dict[str, float]:
    """Return the spread of the first rank's time for one micro-batch, forward and backward, over its mean."""
    order, pipeline = StepOrder(recipe), recipe.parallel.pipeline_model_parallel_size
    numbers = packs.images.ravel().tolist()
    times = np.array(
        [
            sum(forward[::pipeline]) + sum(backward[::pipeline])
            for forward, backward in zip(*order.work(numbers), strict=True)
        ]
    )
    return {"stage_spread": float(times.std() / times.mean()), "stage_longest": float(times.max() / times.mean())}


def measure(steps: int) -> dict[str, Any]:
    """Simulate all cases; ``steps`` steps of each."""
    result: dict[str, Any] = {"cases": []}
    for name, case in CASES.items():
        for mix in case.mixes:
            count = steps * case.microbatches
            packed = {balanced: pack(mix, case.replicas, count, balanced=balanced) for balanced in (False, True)}
            recipe = case.best_recipe(float(packed[False].images.mean()))
            rows = {}
            for way, (balanced, ordered) in WAYS.items():
                packs = packed[balanced]
                rows[way] = {
                    "padding": packs.padding,
                    "images": float(packs.images.mean()),
                    "images_spread": float(packs.images.std()),
                    "choose_us": 1e6 * packs.seconds,
                    **first_stage(packs, recipe),
                    **run_steps(packs, recipe, steps, ordered=ordered),
                }
            first = recipe.parallel.num_layers_in_first_pipeline_stage
            result["cases"].append({"name": name, "mix": mix, "first": first, "rows": rows, **_layout(case)})
    return result


def _layout(case: Case) -> dict[str, Any]:
    chunks = {} if case.virtual is None else {"vpp": case.virtual}
    return {"tp": case.tensor, "pp": case.pipeline, **chunks, "dp": case.replicas, "microbatches": case.microbatches}


def table(result: dict[str, Any]) -> str:
    """Return the Markdown of a result."""
    lines = [f"Command: `{result['command']}` ({result['seconds']:.0f} s, {result['steps']} steps of each case)", ""]
    lines += [f"- {name}: {text}" for name, text in FULL_SCALE_DESCRIPTIONS.items()]
    lines += ["", "| mix | padding | images of a pack | first stage's time | bubble | ordered | balanced | both |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    name = None
    for case in result["cases"]:
        if case["name"] != name:
            name = case["name"]
            chunks = f" x VPP {case['vpp']}" if "vpp" in case else ""
            layout = f"TP {case['tp']} x PP {case['pp']}{chunks} x DP {case['dp']}"
            lines.append(f"| **{name}**: {layout}, {case['microbatches']} micro-batches | | | | | | | |")
        lines.append(_row(case))
    costs = [[case["rows"][way]["choose_us"] for case in result["cases"]] for way in ("length", "balanced")]
    length, balanced = map(np.median, costs)
    lines += ["", f"Choosing a pack took {length:.0f} us on length alone and {balanced:.0f} us on images too."]
    return "\n".join(lines)


def _row(case: dict[str, Any]) -> str:
    base, best = case["rows"]["length"], case["rows"]["both"]

    def useful(row: dict[str, float]) -> float:
        return (1 - row["bubble"]) * (1 - row["padding"])

    times = [f"{useful(base) / useful(case['rows'][way]):.3f}" for way in ("ordered", "balanced", "both")]
    cells = [
        case["mix"],
        f"{base['padding']:.2%} -> {best['padding']:.2%}",
        f"{base['images']:.1f} +- {base['images_spread']:.2f} -> +- {best['images_spread']:.2f}",
        f"+- {base['stage_spread']:.1%} -> +- {best['stage_spread']:.1%}",
        f"{base['bubble']:.1%} -> {best['bubble']:.1%}",
        *times,
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Measure, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description="Packing and ordering for the pipeline, simulated.")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON as well")
    parser.add_argument("--steps", type=int, default=8, help="steps of each case (default 8)")
    arguments = parser.parse_args()
    start = time.perf_counter()
    result = measure(arguments.steps)
    result["native"] = native_balance.measure(arguments.steps)
    result["seconds"], result["steps"] = time.perf_counter() - start, arguments.steps
    script = Path(sys.argv[0])
    result["command"] = shlex.join(["python", str(Path(script.parent.name) / script.name), *sys.argv[1:]])
    print(table(result), native_balance.table(result["native"]), sep="\n\n")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
