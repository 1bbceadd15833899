"""The part of ``pipeline_balance`` about pictures that keep sizes of their own: packs weighed by the tower's own cost.

Against packs on length alone, and against packs that count pictures, as those of equal pictures do. Samples are random:
their sizes go through the model's own image plan, and films are grids of frames. The steps are simulated as in
``pipeline_balance``, with what the tower's cost says of every picture.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from megavlm.config.schema import Recipe
from megavlm.data.media import ImagePlan, plan_of
from megavlm.data.packing import CarryOverPacker
from megavlm.data.plans_native import NativePlan
from megavlm.families.presets import expand_presets
from megavlm.planning.schedule import simulate
from megavlm.planning.weighing import Weigher
from megavlm.training.order import StepOrder

BUFFER = 256
SETTLING = 80
"""Packs of each replica that are left out at the start."""
TEXT = (150, 0.8)
"""Median of a sample's text in tokens, and the standard deviation of its logarithm."""

# Share, width, height. Sizes are those of COCO's photographs, of pages at 150 dpi, of screens and telephones.
PICTURES = (
    (40, 640, 480), (10, 480, 640), (15, 1024, 768), (15, 1240, 1754), (10, 1920, 1080), (5, 3024, 4032), (5, 300, 200),
)  # fmt: skip
DESCRIPTIONS = {
    "native": "pictures of real sizes (half photographs of some 640 x 480, 15 % pages of 1240 x 1754, screens, "
    "photographs of a telephone, small ones), each side up to a fifth longer or shorter, one to three a sample; a tenth"
    " is text",
    "video": "half films of 4 to 32 pairs of frames of 252 x 448, half samples of `native`",
}


@dataclass(frozen=True)
class Case:
    """A training run whose steps are simulated."""

    preset: str
    tensor: int
    pipeline: int
    replicas: int
    microbatches: int
    mix: str
    length: int = 8192
    max_pixels: int | None = None

    def recipe(self, first: int | None = None) -> Recipe:
        """Return the run with ``first`` layers in its first stage."""
        tree = {
            "output_dir": "unused",
            "model": {"preset": self.preset, "image": {"max_pixels": self.max_pixels}},
            "parallel": {
                "tensor_model_parallel_size": self.tensor,
                "pipeline_model_parallel_size": self.pipeline,
                "num_layers_in_first_pipeline_stage": first,
            },
            "data": {"train": [{"path": "unused"}], "tokenizer": "unused", "sequence_length": self.length},
            "optimizer": {"lr": 1e-5},
            "training": {"train_steps": 1, "global_batch_size": self.replicas * self.microbatches},
        }
        recipe: Recipe = TypeAdapter(Recipe).validate_python(expand_presets(tree))
        return recipe


CASES = {
    "Qwen2-VL-7B, all trained, 128 GPUs": Case("qwen2_vl_7b", 4, 2, 16, 8, "native", max_pixels=4096 * 28 * 28),
    "Qwen2.5-VL-7B, all trained, 128 GPUs": Case("qwen2_5_vl_7b", 4, 2, 16, 8, "native", max_pixels=4096 * 28 * 28),
    "Qwen2.5-VL-7B, all trained, 256 GPUs": Case("qwen2_5_vl_7b", 4, 4, 16, 16, "native", max_pixels=4096 * 28 * 28),
    "Qwen2.5-VL-7B, films, 128 GPUs": Case("qwen2_5_vl_7b", 4, 2, 16, 8, "video", 16384),
}


@dataclass(frozen=True)
class Sample:
    """How long a sample is, and its pictures and films as frames, rows and columns of patches."""

    tokens: int
    grids: tuple[tuple[int, int, int], ...]

    def __len__(self) -> int:
        """Tokens."""
        return self.tokens


@dataclass(frozen=True)
class Layout:
    """A picture or film as the weigher asks of it."""

    patches: tuple[int, int, int]

    @property
    def grids(self) -> tuple[tuple[int, int, int], ...]:
        """Those that the tower gets: one."""
        return (self.patches,)


def samples(case: Case, plan: ImagePlan, seed: int) -> Iterator[Sample]:
    """Yield samples without end; those longer than a pack are left out."""
    assert isinstance(plan, NativePlan)
    rng = np.random.default_rng(seed)
    shares = np.array([share for share, *_ in PICTURES]) / sum(share for share, *_ in PICTURES)

    def picture() -> tuple[int, int, int]:
        _, width, height = PICTURES[rng.choice(len(PICTURES), p=shares)]
        found = plan.plan(*(int(side * rng.uniform(0.8, 1.2)) for side in (width, height))).patches
        assert found is not None
        return found

    while True:
        kind = rng.random()
        if case.mix == "video" and kind < 0.5:
            grids = [(int(rng.integers(4, 33)), 252 // plan.patch, 448 // plan.patch)]
        elif kind > 0.9:
            grids = []
        else:
            grids = [picture() for _ in range(rng.choice([1, 2, 3], p=[0.7, 0.2, 0.1]))]
        text = int(np.clip(rng.lognormal(np.log(TEXT[0]), TEXT[1]), 8, 2048))
        tokens = text + sum(t * h * w // plan.merge**2 + 2 for t, h, w in grids)
        if tokens <= case.length:
            yield Sample(tokens, tuple(grids))


@dataclass(frozen=True)
class Packs:
    """The packs of all replicas."""

    grids: list[list[list[tuple[int, int, int]]]]
    """By replica and pack, its pictures."""
    padding: float
    """Share of the positions."""
    choose_us: float
    """Time to choose one pack."""


def pack(case: Case, plan: ImagePlan, count: int, weigh: Callable[[Sample], int] | None) -> Packs:
    """Pack ``count`` packs for each replica, each from its own stream of samples."""
    found: list[list[list[tuple[int, int, int]]]] = []
    tokens, seconds, made = 0, 0.0, 0
    for replica in range(case.replicas):
        stream, own = samples(case, plan, seed=replica), []
        packer: CarryOverPacker[Sample] = CarryOverPacker(case.length, BUFFER, weigh)
        while len(own) < SETTLING + count:
            sample = next(stream)
            start = time.perf_counter()
            chosen = packer.add(sample)
            seconds += time.perf_counter() - start
            if chosen:
                own.append(chosen)
        made += len(own)
        found.append([[grid for sample in chosen for grid in sample.grids] for chosen in own[SETTLING:]])
        tokens += sum(len(sample) for chosen in own[SETTLING:] for sample in chosen)
    return Packs(found, 1 - tokens / (case.replicas * count * case.length), 1e6 * seconds / made)


def best_recipe(case: Case, packs: Packs) -> Recipe:
    """Return the run with the first stage's share of layers that is fastest for one replica's packs."""
    layers, others = case.recipe().model.language.num_layers, case.pipeline - 1
    firsts = [first for first in range(1, layers) if (layers - first) % others == 0]
    shown = packs.grids[0][: case.microbatches]
    return min((case.recipe(first) for first in firsts), key=lambda recipe: StepOrder(recipe).seconds(shown))


def counted_order(order: StepOrder, shown: Sequence[Sequence[tuple[int, int, int]]]) -> list[int]:
    """Return the order of one that takes every picture for one of usual size."""
    side, _ = order.recipe.model.vision.grid
    return order([[(1, side, side)] * len(pictures) for pictures in shown])


def run_steps(packs: Packs, recipe: Recipe, steps: int, ordered: str) -> dict[str, float]:
    """Simulate steps, with the cost of the pictures as they are.

    Args:
        packs: what is run.
        recipe: where.
        steps: how many.
        ordered: ``read``, ``counted`` or ``weighed``.

    Returns:
        ``seconds`` of a step, in 1e12 operations of one rank; ``bubble``: share of all ranks' time in which they wait,
        for the slowest replica at the end of the step included.
    """
    order, total, busy, pipeline = StepOrder(recipe), 0.0, 0.0, recipe.parallel.pipeline_model_parallel_size
    per_step = len(packs.grids[0]) // steps
    for step in range(steps):
        slowest = 0.0
        for replica in packs.grids:
            shown = replica[step * per_step : (step + 1) * per_step]
            if ordered != "read":
                chosen = counted_order(order, shown) if ordered == "counted" else order(shown)
                shown = [shown[index] for index in chosen]
            timeline = simulate(*order.work(shown), pipeline=pipeline, virtual=None)
            slowest = max(slowest, timeline.total)
            busy += sum(timeline.busy)
        total += slowest
    return {"seconds": total / steps, "bubble": 1 - busy / (total * pipeline * len(packs.grids))}


def first_stage(packs: Packs, recipe: Recipe) -> float:
    """Return the spread of the first rank's time for one micro-batch, over its mean."""
    order = StepOrder(recipe)
    both = [order.work(replica) for replica in packs.grids]
    times = np.array(
        [one[0] + two[0] for forward, backward in both for one, two in zip(forward, backward, strict=True)]
    )
    return float(times.std() / times.mean())


def measure(steps: int) -> list[dict[str, Any]]:
    """Simulate all cases; ``steps`` steps of each."""
    found = []
    for name, case in CASES.items():
        recipe = case.recipe()
        plan, weigher = plan_of(recipe.model), Weigher(recipe)
        ways: dict[str, Callable[[Sample], int] | None] = {
            "read": None,
            "counted": lambda sample: len(sample.grids),
            "weighed": lambda sample, weigher=weigher: weigher([Layout(grid) for grid in sample.grids]),  # type: ignore[misc]
        }
        packed = {way: pack(case, plan, steps * case.microbatches, weigh) for way, weigh in ways.items()}
        recipe = best_recipe(case, packed["read"])
        rows = {
            way: {
                "padding": packs.padding, "choose_us": packs.choose_us, "stage_spread": first_stage(packs, recipe),
                **run_steps(packs, recipe, steps, way),
            }
            for way, packs in packed.items()
        }  # fmt: skip
        found.append({
            "name": name, "mix": case.mix, "rows": rows, "tp": case.tensor, "pp": case.pipeline, "dp": case.replicas,
            "microbatches": case.microbatches, "first": recipe.parallel.num_layers_in_first_pipeline_stage,
        })  # fmt: skip
    return found


def useful(row: dict[str, float]) -> float:
    """Return the share of all ranks' time that goes into real tokens."""
    return (1 - row["bubble"]) * (1 - row["padding"])


def row(case: dict[str, Any]) -> str:
    """Return one line of the table."""
    rows = case["rows"]
    three = [rows[way] for way in ("read", "counted", "weighed")]
    cells = [
        f"{case['name']}: TP {case['tp']} x PP {case['pp']} x DP {case['dp']}, {case['microbatches']} micro-batches",
        case["mix"],
        *(" / ".join(f"{one[key]:{form}}" for one in three) for key, form in (
            ("padding", ".2%"), ("stage_spread", ".1%"), ("bubble", ".1%"),
        )),
        *(f"{useful(rows['read']) / useful(rows[way]):.3f}" for way in ("counted", "weighed")),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def table(cases: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown of the cases."""
    lines = [f"- {name}: {text}" for name, text in DESCRIPTIONS.items()]
    lines += ["", "| pictures of any size | mix | padding | first stage's spread | bubble | counted | weighed |"]
    lines += ["|---|---|---|---|---|---|---|", *map(row, cases)]
    costs = [np.median([case["rows"][way]["choose_us"] for case in cases]) for way in ("read", "counted", "weighed")]
    lines += [
        "",
        "Choosing a pack took {:.0f} us on length alone, {:.0f} us counted and {:.0f} us weighed.".format(*costs),
    ]
    return "\n".join(lines)
