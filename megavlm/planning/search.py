"""The search for a layout: all that could be tried, what is refused and why, and the fastest of the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from megavlm.config.checks import check_recipe
from megavlm.config.errors import RecipeError
from megavlm.config.schema import Recipe
from megavlm.planning.activations import kernels_of
from megavlm.planning.experts import expert_layouts
from megavlm.planning.gpus import GIB, Gpu
from megavlm.planning.layout import GPUS_PER_NODE, Layout, chunks_of, layout_of, tried, with_parallel
from megavlm.planning.memory import StageMemory, fits, least_total, stage_memory, usable_bytes
from megavlm.planning.parameters import check_costs
from megavlm.planning.reckoned import Reckoned
from megavlm.planning.rules import Rules
from megavlm.planning.seconds import StepTime
from megavlm.planning.timing import Timer
from megavlm.planning.workload import Workload

_RECOMPUTE = (None, "selective", "full")
_CONTEXTS = (1, 2, 4, 8, 16)
_LEAST_PIECE = 8192
"""Tokens of a rank below which packs are not cut: their other ways of being spread cost less."""
_SIMULATED = 10
"""Of so many layouts the whole step is simulated in the end."""
_NEARLY = 0.99995
"""Of the best time: a layout whose least is above it is not faster, whatever is lost in rounding."""
_UNEVEN = 2.0
"""The first stage may have at most this times its even share of layers."""


@dataclass(frozen=True)
class Plan:
    """One layout with what it needs and takes."""

    recipe: Recipe
    """The recipe with this layout in its ``parallel`` branch."""
    layout: Layout
    memory: tuple[StageMemory, ...]
    """Of a rank of each stage."""
    time: StepTime

    @property
    def fullest(self) -> int:
        """Bytes that the fullest stage needs."""
        return max(memory.total for memory in self.memory)

    @property
    def days(self) -> float | None:
        """Days of the whole run; None where its length is given in epochs."""
        steps = self.recipe.training.train_steps
        return None if steps is None else steps * self.time.step / 86400

    @property
    def gpu_hours(self) -> float | None:
        """GPU-hours of the whole run; None as :attr:`days`."""
        return None if self.days is None else self.days * 24 * self.layout.gpus


@dataclass(frozen=True)
class Refusal:
    """Why there is no layout with these sizes."""

    tensor: int
    pipeline: int
    reason: str
    context: int = 1


@dataclass(frozen=True)
class Search:
    """What came out."""

    plans: tuple[Plan, ...]
    """The best of each TP x CP x PP x VPP, fastest first."""
    refusals: tuple[Refusal, ...]
    """Sizes of which no layout is left."""
    tried: int
    """Layouts looked at."""
    gpus: int
    """On so many GPUs."""


def search(
    recipe: Recipe, gpus: int, gpu: Gpu, workload: Workload, among: Collection[tuple[int, int]] | None = None
) -> Search:
    """Look for the fastest layout of a recipe on ``gpus`` GPUs.

    TP stays inside a node. The layers of the first stage are varied to weigh against the tower. Of layouts with the
    same TP, CP, PP and VPP only the fastest is listed. ``among`` are the TP and PP to try, where not all are.

    Raises:
        RecipeError: the recipe is wrong whatever the layout, or its model has parts that the planner does not know.
    """
    check_costs(recipe.model)
    if kernels_of(recipe).fp8 and gpu.fp8_flops is None:
        raise RecipeError(f"engine.fp8: {gpu.name} has no FP8; set it to null, or plan for an H100 or H200")
    check_recipe(with_parallel(recipe, **_ONE))
    best: list[Plan] = []
    refusals: list[Refusal] = []
    trial = _Trial(recipe, gpus, gpu, workload)
    for tp, cp, pp in _sizes(recipe, gpus):
        if among is None or (tp, pp) in among:
            found = trial.fastest(_values(recipe, gpus, tp, cp, pp))
            if isinstance(found, str):
                refusals.append(Refusal(tp, pp, found, cp))
            else:
                best += found
    plans = sorted(best, key=lambda plan: plan.time.step)
    exact = [trial.simulated(plan) for plan in plans[:_SIMULATED]]
    plans = sorted(exact, key=lambda plan: plan.time.step) + plans[_SIMULATED:]
    return Search(tuple(plans), tuple(refusals), trial.tried, gpus)


_ONE: dict[str, Any] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "num_layers_in_first_pipeline_stage": None,
    "context_parallel_size": 1,
    "cp_comm_type": "p2p",
    "sequence_parallel": False,
    "recompute_granularity": None,
    "recompute_num_layers": None,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
}


_SPLIT = (
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "num_layers_in_first_pipeline_stage",
)
"""What says which layers lie in which chunk."""


def _sizes(recipe: Recipe, gpus: int) -> Iterator[tuple[int, int, int]]:
    """Yield TP, CP and PP that divide the GPUs; with one placement of the tower, packs are never cut."""
    most = recipe.data.sequence_length // _LEAST_PIECE if recipe.parallel.vision_placement == "first_stage" else 1
    for tp in (1, 2, 4, 8):
        if gpus % tp == 0 and tp <= GPUS_PER_NODE:
            for pp in range(1, min(gpus // tp, recipe.model.language.num_layers) + 1):
                if gpus // tp % pp == 0:
                    yield from ((tp, cp, pp) for cp in _CONTEXTS if gpus // tp // pp % cp == 0 and cp <= max(most, 1))


def _values(recipe: Recipe, gpus: int, tp: int, cp: int, pp: int) -> Iterator[dict[str, Any]]:
    """Yield the ``parallel`` values to try for a TP, a CP and a PP; with experts, for each EP."""
    for spread in expert_layouts(recipe, gpus // pp):
        for values in _values_without_experts(recipe, gpus, tp, cp, pp):
            yield {**values, **spread}


def _values_without_experts(recipe: Recipe, gpus: int, tp: int, cp: int, pp: int) -> Iterator[dict[str, Any]]:
    """Yield the ``parallel`` values to try for a TP, a CP and a PP, but those of experts."""
    layers, data = recipe.model.language.num_layers, gpus // (tp * pp)
    firsts: list[int | None] = [None]
    virtuals: list[int | None] = [None]
    if pp > 1:
        even = layers / pp
        uneven = [first for first in range(1, layers - pp + 2) if (layers - first) % (pp - 1) == 0]
        uneven = [first for first in uneven if first <= _UNEVEN * even] or uneven[:1]
        if recipe.parallel.vision_placement == "all_ranks" and layers % pp == 0:
            uneven = []  # no stage has more to do than the others
        firsts = [None] * (layers % pp == 0) + [first for first in uneven if first != even] or [None]
        virtuals += [v for v in range(2, layers // pp + 2) if any(_chunks_divide(layers, pp, f, v) for f in firsts)]
    for first in firsts:
        for virtual in virtuals:
            if virtual is not None and not _chunks_divide(layers, pp, first, virtual):
                continue
            for recompute in _RECOMPUTE:
                yield {
                    **_ONE,
                    "tensor_model_parallel_size": tp,
                    "context_parallel_size": cp,
                    "pipeline_model_parallel_size": pp,
                    "virtual_pipeline_model_parallel_size": virtual,
                    "num_layers_in_first_pipeline_stage": first,
                    "sequence_parallel": tp > 1 and recipe.data.sequence_length % tp == 0,
                    "use_distributed_optimizer": True,
                    "overlap_grad_reduce": data > 1,
                    "overlap_param_gather": data > 1,
                    "recompute_granularity": recompute,
                }


def _chunks_divide(layers: int, pp: int, first: int | None, virtual: int) -> bool:
    own = layers // pp if first is None else first
    rest = own if first is None else (layers - first) // (pp - 1)
    return own % virtual == 0 and rest % virtual == 0


class _Trial:
    """Tries layouts of one recipe, and keeps what it reckoned for the next ones.

    A layout is simulated only if what is quick to reckon leaves it a chance: most have none.
    """

    def __init__(self, recipe: Recipe, gpus: int, gpu: Gpu, workload: Workload) -> None:
        self._recipe, self._gpus, self._gpu, self._workload = recipe, gpus, gpu, workload
        self._known, self._rules = Reckoned(), Rules(gpus)
        self.tried = 0
        """Layouts looked at."""

    def fastest(self, layouts: Iterable[dict[str, Any]]) -> list[Plan] | str:
        """Return the fastest layout of each VPP, or why none works.

        Args:
            layouts: values of ``parallel``, with the same TP, CP and PP.
        """
        reasons: list[tuple[float, str]] = []
        possible: list[tuple[float, Timer]] = []
        unfit: list[Timer] = []
        for values in layouts:
            self.tried += 1
            timer = self._timer(values)
            if not isinstance(timer, Timer):
                reasons.append((float("inf"), timer))
            elif any(total > usable_bytes(self._gpu) for total in self._least_totals(timer)):
                unfit.append(timer)
            else:
                possible.append((timer.least(), timer))
        best: dict[int | None, Plan] = {}
        # The most promising first: most of the others need no simulation then, nor a look at their memory.
        for least, timer in sorted(possible, key=lambda pair: pair[0]):
            virtual = timer.layout.virtual
            bar = best[virtual].time.step if virtual in best else float("inf")
            if least >= bar:
                continue
            if not all(fits(memory, self._gpu) for memory in self._memory(timer)):
                unfit.append(timer)
            elif timer.least_step() < bar * _NEARLY:
                time = timer.step(whole=False)
                if time.step < bar * 0.9999:
                    recipe = with_parallel(self._recipe, **vars(timer.recipe.parallel))
                    best[virtual] = Plan(recipe, timer.layout, tuple(self._memory(timer)), time)
        return list(best.values()) or self._reason(reasons, unfit)

    def simulated(self, plan: Plan) -> Plan:
        """Return a plan with the time of its whole step."""
        timer = Timer(plan.recipe, plan.layout, self._gpu, self._workload, self._known)
        return replace(plan, time=timer.step())

    def _timer(self, values: dict[str, Any]) -> Timer | str:
        """Return what times a layout, or the first rule that it breaks."""
        recipe = tried(self._recipe, values)
        try:
            if lines := self._rules.broken(recipe):
                raise RecipeError.of(lines)
        except RecipeError as error:
            return str(error).splitlines()[0]
        split = tuple(values[key] for key in _SPLIT)
        chunks = self._known.once(("chunks", *split), lambda: chunks_of(recipe))
        return Timer(recipe, layout_of(recipe, self._gpus, chunks), self._gpu, self._workload, self._known)

    def _memory(self, timer: Timer) -> Iterator[StageMemory]:
        for stage in range(timer.layout.pipeline):
            yield stage_memory(timer.recipe, timer.layout, stage, self._workload, self._known)

    def _least_totals(self, timer: Timer) -> Iterator[int]:
        for stage in range(timer.layout.pipeline):
            yield least_total(timer.recipe, timer.layout, stage, self._known)

    def _reason(self, reasons: list[tuple[float, str]], unfit: list[Timer]) -> str:
        """Return the reason of the layout that is nearest to possible.

        Args:
            reasons: of layouts that break a rule.
            unfit: those that do not fit.
        """
        nearest = min(reasons, default=(float("inf"), ""))
        by_least = sorted(((max(self._least_totals(timer)), timer) for timer in unfit), key=lambda pair: pair[0])
        for least, timer in by_least:
            if least - usable_bytes(self._gpu) > nearest[0]:
                break
            nearest = min(nearest, self._missing(timer))
        return nearest[1]

    def _missing(self, timer: Timer) -> tuple[float, str]:
        """Return how far from possible a layout is that does not fit (bytes missing), and say so."""
        totals = [memory.total for memory in self._memory(timer)]
        need, usable, recompute = max(totals), usable_bytes(self._gpu), timer.recipe.parallel.recompute_granularity
        return need - usable, (
            f"does not fit: stage {totals.index(need)} needs {need / GIB:.1f} GiB, and a plan may use"
            f" {usable / GIB:.1f}; that is with recompute {recompute or 'none'}, the leanest"
        )


def evaluate(recipe: Recipe, gpus: int, gpu: Gpu, workload: Workload) -> Plan:
    """Return what a recipe's own layout, which ``check_recipe`` accepts, needs and takes."""
    layout = layout_of(recipe, gpus)
    memory = tuple(stage_memory(recipe, layout, stage, workload) for stage in range(layout.pipeline))
    return Plan(recipe, layout, memory, Timer(recipe, layout, gpu, workload).step())
