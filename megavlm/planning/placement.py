"""Who should encode pictures, the first stage or all ranks: both are planned, and the faster one that fits is taken."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.architectures.cost import costless
from megavlm.checkpoint.paths import newest_first, read_run, read_tree
from megavlm.config.checks import check_recipe
from megavlm.config.errors import RecipeError, UserError
from megavlm.config.help import to_tree
from megavlm.config.schema import Recipe
from megavlm.planning.gpus import DEFAULT, GIB, Gpu, find_gpu
from megavlm.planning.launch import KEYS
from megavlm.planning.layout import with_placement
from megavlm.planning.memory import fits, usable_bytes
from megavlm.planning.search import Plan, Search, evaluate, search
from megavlm.planning.workload import Workload, assume_workload

logger = logging.getLogger(__name__)

FIRST, ALL, AUTO = "first_stage", "all_ranks", "auto"
_WORTH = 0.02
"""All ranks encode where this part of a step is saved, at least: plans are not exact."""
_NEAR = 5
_RECORD = "vision_placement_auto"


@dataclass(frozen=True)
class Placements:
    """Both placements; of one that does not work, why."""

    first_stage: Plan | str
    all_ranks: Plan | str

    @property
    def better(self) -> str:
        """The faster one; the first stage where nothing speaks for the other."""
        if isinstance(self.all_ranks, str):
            return FIRST
        if isinstance(self.first_stage, str):
            return ALL
        saved = 1 - self.all_ranks.time.step / self.first_stage.time.step
        return ALL if saved >= _WORTH else FIRST

    def reason(self) -> str:
        """Say in a line which to take, and why."""
        first, every = self.first_stage, self.all_ranks
        if isinstance(every, str):
            return f"{FIRST}, as {ALL} does not work: {every}"
        if isinstance(first, str):
            return f"{ALL}, as {FIRST} does not work: {first}"
        times, bubbles = (first.time.step, every.time.step), (first.time.bubble, every.time.bubble)
        gain = abs(times[0] - times[1]) / max(times)
        waits = f"ranks wait for {100 * bubbles[0]:.1f} % of the passes with the tower on the first stage"
        waits += f" and {100 * bubbles[1]:.1f} % with it on all"
        vision = f"{1e3 * every.time.vision:.3g} ms of encoding on all ranks, which nothing hides"
        if self.better == ALL:
            return f"{ALL}, by {100 * gain:.1f} % of a step: {waits} ({vision})"
        if times[1] < times[0]:
            return f"{FIRST}: {ALL} would save {100 * gain:.1f} % of a step, which a plan may be off by ({waits})"
        return f"{FIRST}, by {100 * gain:.1f} % of a step: {waits}, which does not make up for {vision}"


def of_search(recipe: Recipe, found: Search, gpus: int, gpu: Gpu, workload: Workload) -> Placements:
    """Return the best layout of either placement, where ``found`` is the search of the recipe's own one.

    The other is looked for among the sizes that are fastest there, and their like with more stages.
    """
    own = recipe.parallel.vision_placement
    other = FIRST if own == ALL else ALL
    plans: dict[str, Plan | str] = {own if own == ALL else FIRST: _best(found)}
    try:
        near = {(plan.layout.tensor, plan.layout.pipeline) for plan in found.plans[:_NEAR]}
        near |= {(tensor, 2 * pipeline) for tensor, pipeline in near}
        plans[other] = _best(search(with_placement(recipe, other), gpus, gpu, workload, near if found.plans else None))
    except RecipeError as error:
        plans[other] = str(error).splitlines()[0]
    return Placements(plans[FIRST], plans[ALL])


def _best(found: Search) -> Plan | str:
    return found.plans[0] if found.plans else min(refusal.reason for refusal in found.refusals)


def of_layout(recipe: Recipe, gpus: int, gpu: Gpu, workload: Workload) -> Placements:
    """Return either placement at the recipe's own layout."""
    return Placements(*(_at(with_placement(recipe, p), gpus, gpu, workload) for p in (FIRST, ALL)))


def _at(recipe: Recipe, gpus: int, gpu: Gpu, workload: Workload) -> Plan | str:
    try:
        check_recipe(recipe, gpus)
    except RecipeError as error:
        return str(error).splitlines()[0]
    plan = evaluate(recipe, gpus, gpu, workload)
    if not all(fits(memory, gpu) for memory in plan.memory):
        return f"a stage needs {plan.fullest / GIB:.1f} GiB, and a plan may use {usable_bytes(gpu) / GIB:.1f}"
    return plan


def settled(recipe: Recipe, gpus: int) -> Recipe:
    """Return the recipe with ``parallel.vision_placement: auto`` settled for a job of so many processes.

    Reckoned for the GPU that ``megavlm plan`` takes without ``--gpu``, and the pack that it assumes: all ranks find the
    same, whatever they run on. A run that goes on keeps what it was begun with (:func:`record`), at the same layout.
    """
    if recipe.parallel.vision_placement != AUTO:
        return recipe
    if (kept := _kept(recipe, gpus)) is not None:
        logger.info("parallel.vision_placement: %s, as the run was planned when it began", kept)
        return with_placement(recipe, kept)
    gpu = find_gpu(DEFAULT)
    try:
        if costless(recipe.model):
            raise RecipeError("an architecture has no figures of its cost")
        found = of_layout(recipe, gpus, gpu, assume_workload(recipe))
        # Where neither fits that GPU, another is meant.
        chosen, why = found.better, found.reason()
    except RecipeError as error:
        chosen, why = FIRST, f"{FIRST}, as nothing can be planned: {error}"
    logger.info("parallel.vision_placement: %s (planned for %s)", why, gpu.name)
    return with_placement(recipe, chosen)


def record(given: Recipe, recipe: Recipe) -> dict[str, str]:
    """Return what ``run.json`` says of the placement: what ``auto`` of the recipe as given was settled to."""
    return {_RECORD: recipe.parallel.vision_placement} if given.parallel.vision_placement == AUTO else {}


def _kept(recipe: Recipe, gpus: int) -> str | None:
    """Return what ``auto`` was settled to in the run's newest checkpoint; None where there is none, or all is new."""
    newest = newest_first(Path(recipe.output_dir) / "checkpoints") if recipe.checkpoint.resume else []
    try:
        run = read_run(newest[0]) if newest else {}
        if run.get(_RECORD) not in (FIRST, ALL) or run.get("world_size") != gpus:
            return None
        then, now = _planned_from(read_tree(newest[0])), _planned_from(to_tree(recipe))
        if any(then[key] != now[key] for key in then.keys() & now.keys()):  # one may be newer, and know more keys
            return None
        check_recipe(with_placement(recipe, run[_RECORD]), gpus)
    except (UserError, OSError):  # who loads it says what is wrong
        return None
    return str(run[_RECORD])


def _planned_from(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a recipe that make the layout, without those that are settled."""
    made = set(KEYS) - {"vision_placement", "vision_recompute"}
    own = {key: value for key, value in (tree.get("parallel") or {}).items() if key in made}
    return {**own, "batch": (tree.get("training") or {}).get("global_batch_size")}
