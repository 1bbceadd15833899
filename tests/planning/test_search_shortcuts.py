"""The search's shortcuts change nothing: it finds what trying, checking and simulating every layout finds."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Collection, Iterator
from typing import Any

import pytest

from megavlm.config.checks import check_recipe
from megavlm.config.errors import RecipeError
from megavlm.config.load import load_recipe
from megavlm.config.schema import ParallelConfig, Recipe
from megavlm.families.presets import expand_presets
from megavlm.planning.activations import Held
from megavlm.planning.gpus import GIB, Gpu, find_gpu
from megavlm.planning.layout import layout_of, tried, with_parallel, with_placement
from megavlm.planning.memory import _peak, fits, stage_memory, usable_bytes
from megavlm.planning.parameters import chunk_elements, chunk_parameters
from megavlm.planning.reckoned import Reckoned
from megavlm.planning.rules import AskedRule, Rules
from megavlm.planning.schedule import rank_order
from megavlm.planning.search import _ONE, Plan, Refusal, Search, _sizes, _values, evaluate, search
from megavlm.planning.timing import Timer
from megavlm.planning.workload import Workload, assume_workload

H100 = find_gpu("h100-80g")
Sizes = Collection[tuple[int, int]]


def shipped(name: str, *keys: str, layers: int | None = None, **parallel: Any) -> Recipe:
    """A recipe that is shipped, with as many language layers."""
    recipe = load_recipe(name, list(keys), expand_presets)
    if layers is not None:
        language = dataclasses.replace(recipe.model.language, num_layers=layers)
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, language=language))
    return with_parallel(recipe, **parallel)


def every_layout(recipe: Recipe, gpus: int, gpu: Gpu, workload: Workload, among: Sizes) -> Search:
    """Try every layout by itself, and simulate all that fit."""
    best: dict[tuple[int, int, int, int | None], Plan] = {}
    refusals, tried_layouts = [], 0
    for tp, cp, pp in _sizes(recipe, gpus):
        if (tp, pp) not in among:
            continue
        reasons, possible = [], []
        for values in _values(recipe, gpus, tp, cp, pp):
            tried_layouts += 1
            one = with_parallel(recipe, **values)
            try:
                check_recipe(one, gpus)
            except RecipeError as error:
                reasons.append((float("inf"), str(error).splitlines()[0]))
                continue
            layout = layout_of(one, gpus)
            memory = tuple(stage_memory(one, layout, stage, workload) for stage in range(pp))
            need, usable = max(stage.total for stage in memory), usable_bytes(gpu)
            if fits(max(memory, key=lambda stage: stage.total), gpu):
                possible.append((Timer(one, layout, gpu, workload).least(), one, layout, memory))
                continue
            fullest = [stage.total for stage in memory].index(need)
            text = f"does not fit: stage {fullest} needs {need / GIB:.1f} GiB, and a plan may use"
            text += f" {usable / GIB:.1f}; that is with recompute {values['recompute_granularity'] or 'none'}, the"
            reasons.append((need - usable, f"{text} leanest"))
        if not possible:
            refusals.append(Refusal(tp, pp, min(reasons)[1], cp))
        for _, one, layout, memory in sorted(possible, key=lambda each: each[0]):
            key = tp, cp, pp, layout.virtual
            time = Timer(one, layout, gpu, workload).step(whole=False)
            if key not in best or time.step < best[key].time.step * 0.9999:
                best[key] = Plan(one, layout, memory, time)
    plans = sorted(best.values(), key=lambda plan: plan.time.step)
    exact = [evaluate(plan.recipe, gpus, gpu, workload) for plan in plans[:10]]
    plans = sorted(exact, key=lambda plan: plan.time.step) + plans[10:]
    return Search(tuple(plans), tuple(refusals), tried_layouts, gpus)


def case(name: str) -> tuple[Recipe, int, Sizes]:
    """Return a recipe, GPUs, and the TP and PP to try."""
    if name == "experts":
        return shipped("qwen3_vl_30b_a3b/sft", layers=6), 8, {(1, 1), (2, 2), (1, 4)}
    if name == "experts that fit nowhere":
        return shipped("qwen3_vl_30b_a3b/sft"), 4, {(1, 2), (4, 1)}
    if name == "native":
        return shipped("qwen3_vl_8b/sft", layers=6), 8, {(8, 1), (2, 2)}
    if name == "attention to pictures, adapters":
        return shipped("llama3_2_vision_11b/lora"), 8, {(2, 4)}
    dense = shipped("belle_vl_14b/sft", layers=8)
    if name == "dense, tower on all ranks":
        return with_placement(dense, "all_ranks"), 8, {(2, 2)}
    if name == "dense, batches that do not divide":
        return dense, 24, {(2, 1), (2, 2), (2, 3)}
    return dense, 8, {(1, 1), (4, 2), (1, 4)}


CASES = (
    "dense", "dense, batches that do not divide", "dense, tower on all ranks", "native", "experts",
    "experts that fit nowhere", "attention to pictures, adapters",
)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_search_finds_what_trying_everything_finds(name: str) -> None:
    recipe, gpus, among = case(name)
    workload = assume_workload(recipe)
    found, expected = search(recipe, gpus, H100, workload, among), every_layout(recipe, gpus, H100, workload, among)
    assert found.refusals == expected.refusals and found.tried == expected.tried
    assert found.plans == expected.plans
    assert bool(found.plans) == ("nowhere" not in name) and bool(found.refusals) == ("that" in name)


@pytest.mark.parametrize("name", ["dense", "dense, tower on all ranks", "experts", "attention to pictures, adapters"])
def test_what_layouts_share_is_what_each_has_alone(name: str) -> None:
    recipe, gpus, _ = case(name)
    workload, known, rules, ends = assume_workload(recipe), Reckoned(), Rules(gpus), set()
    for sizes in _sizes(recipe, gpus):
        for values in list(_values(recipe, gpus, *sizes))[::5]:
            one = tried(recipe, values)
            assert one == with_parallel(recipe, **values)
            said = checked(one, gpus)
            assert rules.broken(one) == said
            ends.add(not said)
            if said:
                continue
            layout = layout_of(one, gpus)
            for stage in range(layout.pipeline):
                alone = stage_memory(one, layout, stage, workload)
                assert stage_memory(one, layout, stage, workload, known) == alone
            timers = Timer(one, layout, H100, workload, known), Timer(one, layout, H100, workload)
            times = [timer.step(whole=False) for timer in timers]
            assert times[0] == times[1]
            bounds = timers[0].least(), timers[0].least_step(), times[0].step
            assert bounds[0] <= bounds[1] * (1 + 1e-9) <= bounds[2] * (1 + 2e-9)
    assert True in ends


def checked(recipe: Recipe, gpus: int) -> list[str]:
    """Return what ``check_recipe`` says."""
    try:
        check_recipe(recipe, gpus)
    except RecipeError as error:
        return str(error).splitlines()
    return []


def test_a_rule_is_asked_again_where_what_it_reads_is_another() -> None:
    """Of its own keys, of those that it reads for some values of others alone, and of copies and comparisons."""
    recipe, plain, asked = shipped("quickstart"), ParallelConfig(), []

    def nested(one: Recipe) -> Iterator[str]:
        asked.append(one)
        if one.parallel.tensor_model_parallel_size > 1 and one.parallel.with_tensor(8).sequence_parallel:
            yield "sequence_parallel"

    def replaced(one: Recipe) -> Iterator[str]:
        asked.append(one)
        if dataclasses.replace(one.parallel, pipeline_model_parallel_size=2).sequence_parallel:
            yield "sequence_parallel"

    def whole(one: Recipe) -> Iterator[str]:
        asked.append(one)
        if one.parallel != plain:
            yield "not plain"

    def by_dict(one: Recipe) -> Iterator[str]:
        asked.append(one)
        if vars(one.parallel)["sequence_parallel"]:
            yield "sequence_parallel"

    keys = "tensor_model_parallel_size", "sequence_parallel", "pipeline_model_parallel_size"
    layouts = [
        dataclasses.replace(recipe, parallel=dataclasses.replace(plain, **dict(zip(keys, values, strict=True))))
        for values in itertools.product((1, 2), (False, True), (1, 2))
    ]
    # The second reads all but what it replaces.
    for rule, times in ((nested, 3), (replaced, 4), (whole, 8), (by_dict, 8)):
        expected, own = [list(rule(one)) for one in layouts], AskedRule(rule)
        asked.clear()
        assert [list(own.lines(one)) for one in [*layouts, *layouts]] == [*expected, *expected]
        assert len(asked) == times


@pytest.mark.parametrize("name", ["dense", "experts", "attention to pictures, adapters"])
def test_elements_of_groups_are_those_of_all_parameters(name: str) -> None:
    recipe, gpus, _ = case(name)
    known = Reckoned()
    for values in itertools.islice(_values(recipe, gpus, 2, 1, 2), 0, None, 7):
        one = tried(recipe, values)
        layout = layout_of(one, gpus)
        for chunk, spread in itertools.product(layout.chunks, (False, True)):
            found = [p for p in chunk_parameters(one, layout, chunk) if p.spread == spread]
            sizes = [p.elements for p in found if p.learns]
            counted = chunk_elements(one, layout, chunk, known, spread=spread)
            assert counted.learning == sum(sizes)
            assert counted.frozen == sum(p.elements for p in found if not p.learns)
            assert counted.quantised == sum(p.elements for p in found if p.quantised)
            end = 0
            for size in sizes:  # each begins at a multiple of 64
                end = -(-end // 64) * 64 + size
            assert counted.end == end and counted.buffer(5) == -(-end // 640) * 640


@pytest.mark.parametrize(("pipeline", "virtual"), [(1, None), (4, None), (4, 2), (3, 3)])
def test_the_fullest_moment_is_that_of_the_whole_walk(pipeline: int, virtual: int | None) -> None:
    draw, recipe = random.Random(0), with_parallel(shipped("quickstart", layers=36), **_ONE)
    parallel = {"pipeline_model_parallel_size": pipeline, "virtual_pipeline_model_parallel_size": virtual}
    layout = dataclasses.replace(layout_of(tried(recipe, parallel), pipeline), microbatches=3 * pipeline)
    for stage, _ in itertools.product(range(pipeline), range(40)):
        least = draw.choice((0, 1))
        held = [Held(*(draw.randint(least, 9) for _ in range(3)), draw.randint(0, 60), draw.randint(0, 60))
                for _ in range(virtual or 1)]  # fmt: skip
        if least == 0:
            held[0] = Held(0, 0, 0, held[0].forward, held[0].backward)
        kept, best, expected = [0] * len(held), -1, None
        calls = rank_order(stage, min(layout.microbatches, 2 * pipeline), pipeline=pipeline, virtual=virtual)
        for call in calls:
            kept[call.chunk] += call.kind == "F"
            passing = held[call.chunk].forward if call.kind == "F" else held[call.chunk].backward
            total = passing + sum(number * one.kept for number, one in zip(kept, held, strict=True))
            if total > best:
                best, expected = total, (tuple(kept), passing)
            kept[call.chunk] -= call.kind == "B"
        counts, passing = _peak(layout, stage, held, Reckoned())
        assert (tuple(counts), passing) == expected
