"""Who should encode pictures, the first stage or all ranks: both are planned, and the faster one that fits is taken."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megavlm.architectures.cost import costless
from megavlm.checkpoint.paths import newest_first, read_run, read_tree
from megavlm.config.checks import check_recipe
from megavlm.config.errors import RecipeError, UserError
from megavlm.config.help import to_tree
from megavlm.config.schema import Recipe
from megavlm.config.vision import APART_KEYS
from megavlm.planning.gpus import DEFAULT, GIB, Gpu, find_gpu
from megavlm.planning.launch import KEYS
from megavlm.planning.layout import layout_of, with_parallel, with_placement
from megavlm.planning.memory import fits, stage_memory, usable_bytes
from megavlm.planning.search import Plan, Search, evaluate, search
from megavlm.planning.workload import Workload, assume_workload

logger = logging.getLogger(__name__)

FIRST, ALL, AUTO = "first_stage", "all_ranks", "auto"
_WORTH = 0.02
"""All ranks encode where this part of a step is saved, at least: plans are not exact."""
_NEAR = 5
_RECORD, _SHARDS = "vision_placement_auto", "vision_shards_auto"


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
        if every.layout.together:
            vision = f"in shards of parallel.vision_shards, as it does not fit whole; {vision}"
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
        among = near if found.plans else None
        plans[other] = _best(search(with_placement(recipe, other), gpus, gpu, workload, among))
        if isinstance(plans[other], str) and other == ALL and _may_cut(recipe):
            plan = _best(search(_cut(recipe), gpus, gpu, workload, among))
            plans[other] = plans[other] if isinstance(plan, str) else plan
    except RecipeError as error:
        plans[other] = str(error).splitlines()[0]
    return Placements(plans[FIRST], plans[ALL])


def _best(found: Search) -> Plan | str:
    return found.plans[0] if found.plans else min(refusal.reason for refusal in found.refusals)


def of_layout(recipe: Recipe, gpus: int, gpu: Gpu, workload: Workload) -> Placements:
    """Return either placement at the recipe's own layout; with ``auto`` in shards where it does not fit whole."""
    first, every = (_at(with_placement(recipe, p), gpus, gpu, workload) for p in (FIRST, ALL))
    if isinstance(every, str) and _may_cut(recipe) and recipe.parallel.tensor_model_parallel_size > 1:
        cut = _at(_cut(recipe), gpus, gpu, workload)
        every = every if isinstance(cut, str) else cut
    return Placements(first, every)


def _may_cut(recipe: Recipe) -> bool:
    """Whether it is left to the plan to cut tower and connector over tensor-parallel ranks."""
    return recipe.parallel.vision_placement == AUTO and recipe.parallel.vision_shards == "whole"


def _cut(recipe: Recipe) -> Recipe:
    return with_parallel(with_placement(recipe, ALL), vision_shards="tensor")


def _at(recipe: Recipe, gpus: int, gpu: Gpu, workload: Workload) -> Plan | str:
    try:
        check_recipe(recipe, gpus)
    except RecipeError as error:
        return str(error).splitlines()[0]
    plan = evaluate(recipe, gpus, gpu, workload)
    if not all(fits(memory, gpu) for memory in plan.memory):
        return f"a stage needs {plan.fullest / GIB:.1f} GiB, and a plan may use {usable_bytes(gpu) / GIB:.1f}"
    return plan


def check_fits(recipe: Recipe, gpus: int, memory_bytes: float, on_cpu: bool) -> None:
    """Refuse ``all_ranks`` that the recipe asks for by name where it does not fit, and warn where it may not.

    It does not fit where packs as the planner assumes them on average do not; it may not where the heaviest do not.

    Args:
        recipe: a checked recipe.
        gpus: processes of the job.
        memory_bytes: of this one.
        on_cpu: that is its part of the host's, without a GPU's context and gaps between allocations.

    Raises:
        RecipeError: with what is missing.
    """
    if recipe.parallel.vision_placement != ALL or costless(recipe.model):
        return
    try:
        workload = assume_workload(recipe)
    except RecipeError:  # a picture of the usual size does not fit its packs: nothing is known of them
        return
    layout, parallel = layout_of(recipe, gpus), recipe.parallel

    def missing(most: int) -> str | None:
        seen = replace(workload, most_views=most)
        memory = [stage_memory(recipe, layout, stage, seen) for stage in range(layout.pipeline)]
        needed = [one.tensors if on_cpu else one.total for one in memory]
        stage = max(range(len(needed)), key=needed.__getitem__)
        if needed[stage] <= memory_bytes:
            return None
        return f"{needed[stage] / GIB:.1f} GiB on a rank of stage {stage}, which has {memory_bytes / GIB:.1f}"

    ways = ["parallel.vision_placement to first_stage"]
    if not parallel.vision_recompute:
        ways.insert(0, "parallel.vision_recompute to true")
    if parallel.vision_shards == "whole" and parallel.tensor_model_parallel_size > 1:
        ways.insert(0, "parallel.vision_shards to tensor")
    remedy = f"set {', or '.join(ways)}"
    if (line := missing(math.ceil(workload.views))) is not None:
        raise RecipeError(f"parallel.vision_placement: all_ranks needs {line} (planned, average packs); {remedy}")
    if (line := missing(workload.most_views)) is not None:
        logger.warning("parallel.vision_placement: all_ranks may need %s (planned, heaviest packs); %s", line, remedy)


def settled(recipe: Recipe, gpus: int) -> Recipe:
    """Return the recipe with ``parallel.vision_placement: auto`` settled for a job of so many processes.

    Reckoned for the GPU that ``megavlm plan`` takes without ``--gpu``, and the pack that it assumes: all ranks find the
    same, whatever they run on. A run that goes on keeps what it was begun with (:func:`record`), at the same layout.

    Raises:
        RecipeError: neither placement goes with the rest of the recipe.
    """
    if recipe.parallel.vision_placement != AUTO:
        return recipe
    if (kept := _kept(recipe, gpus)) is not None:
        placement = kept.parallel.vision_placement
        logger.info("parallel.vision_placement: %s, as the run was planned when it began", placement)
        return kept
    gpu = find_gpu(DEFAULT)
    try:
        if costless(recipe.model):
            raise RecipeError("an architecture has no figures of its cost")
        found = of_layout(recipe, gpus, gpu, assume_workload(recipe))
        # Where neither fits that GPU, another is meant.
        chosen, why = found.better, found.reason()
        cut = not isinstance(found.all_ranks, str) and found.all_ranks.layout.together
    except RecipeError as error:
        chosen, why, cut = FIRST, f"{FIRST}, as nothing can be planned: {error}", False
    placed = _cut(recipe) if cut and chosen == ALL else with_placement(recipe, chosen)
    check_recipe(placed, gpus)  # where neither may be
    logger.info("parallel.vision_placement: %s (planned for %s)", why, gpu.name)
    return placed


def record(given: Recipe, recipe: Recipe) -> dict[str, str]:
    """Return what ``run.json`` says of the placement: what ``auto`` of the recipe as given was settled to."""
    if given.parallel.vision_placement != AUTO:
        return {}
    return {_RECORD: recipe.parallel.vision_placement, _SHARDS: recipe.parallel.vision_shards}


def _kept(recipe: Recipe, gpus: int) -> Recipe | None:
    """Return the recipe with what ``auto`` was settled to in the run's newest checkpoint, in shards if it was then.

    None where there is none, or all is new, or the recipe has a key by now that does not go with it.
    """
    newest = newest_first(Path(recipe.output_dir) / "checkpoints") if recipe.checkpoint.resume else []
    try:
        run = read_run(newest[0]) if newest else {}
        if run.get(_RECORD) not in (FIRST, ALL) or run.get("world_size") != gpus:
            return None
        then, now = _planned_from(read_tree(newest[0])), _planned_from(to_tree(recipe))
        if any(then[key] != now[key] for key in then.keys() & now.keys()):  # one may be newer, and know more keys
            return None
        cut = run[_RECORD] == ALL and run.get(_SHARDS) == "tensor"
        kept = _cut(recipe) if cut else with_placement(recipe, run[_RECORD])
        check_recipe(kept, gpus)
    except (UserError, OSError):  # who loads it says what is wrong
        return None
    return kept


def _planned_from(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a recipe that make the layout, without those that are settled."""
    made = set(KEYS) - {"vision_placement", *APART_KEYS}
    own = {key: value for key, value in (tree.get("parallel") or {}).items() if key in made}
    return {**own, "batch": (tree.get("training") or {}).get("global_batch_size")}
