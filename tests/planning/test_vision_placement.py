"""Both placements of the tower as the planner sees them: what each rank holds, how long a step takes, which to take."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from tiny import tiny_recipe

from megavlm.config.errors import RecipeError
from megavlm.config.schema import Recipe
from megavlm.planning.apart import alone, share_of_step, vision_bytes
from megavlm.planning.gpus import GIB, HEADROOM, find_gpu
from megavlm.planning.layout import layout_of, with_parallel
from megavlm.planning.memory import stage_memory
from megavlm.planning.parameters import apart_elements, chunk_parameters
from megavlm.planning.placement import ALL, FIRST, check_fits, of_layout, settled
from megavlm.planning.timing import Timer
from megavlm.planning.workload import assume_workload

H100 = find_gpu("h100-80g")
EVERY = {"vision_placement": ALL}


def vision_heavy(**parallel: Any) -> Recipe:
    """The 7B with all of it trained, packs of 2048 with as many pictures as fit."""
    recipe = tiny_recipe(
        model={"preset": "qwen_vl_7b", "vision": {}, "connector": {}, "language": {}},
        data={"sequence_length": 2048},
        training={"precision": "bf16", "global_batch_size": 512, "train_steps": 2000},
    )
    return with_parallel(recipe, **parallel)


def test_every_rank_holds_the_tower_that_the_first_stage_held() -> None:
    first = tiny_recipe(parallel={"pipeline_model_parallel_size": 2})
    every = with_parallel(first, **EVERY)
    before, layout = layout_of(first, 4), layout_of(every, 4)
    whole = sum(p.elements for c in before.chunks for p in chunk_parameters(first, before, c))
    language = sum(p.elements for c in layout.chunks for p in chunk_parameters(every, layout, c))
    frozen, learning, buffer = apart_elements(every, layout)
    assert language + frozen + learning == whole and buffer >= learning and buffer % 4 == 0
    still = dataclasses.replace(
        every, modules=dataclasses.replace(every.modules, vision=dataclasses.replace(every.modules.vision, freeze=True))
    )
    kept, trained, _ = apart_elements(still, layout_of(still, 4))
    assert kept + trained == frozen + learning and 0 < trained < learning


def test_memory_is_of_the_replicated_tower_its_share_and_the_features() -> None:
    first, every = vision_heavy(pipeline_model_parallel_size=4), vision_heavy(pipeline_model_parallel_size=4, **EVERY)
    workload = assume_workload(every)
    layout = layout_of(every, 64)
    before = [stage_memory(first, layout_of(first, 64), stage, workload) for stage in range(4)]
    now = [stage_memory(every, layout, stage, workload) for stage in range(4)]
    assert now[3].weights > before[3].weights and now[3].gradients > before[3].gradients
    assert all(memory.vision > 0 for memory in now) and not any(memory.vision for memory in before[1:])
    # The first stage has the features of the whole step, and their gradients; 4096 numbers of 2 bytes for each token.
    features = layout.microbatches * workload.most_views * 256 * 4096 * 2
    assert now[0].vision - now[3].vision == pytest.approx(2 * features, rel=1e-6)
    own = vision_bytes(every, layout, 3, workload.views, workload.most_views)
    assert own.kept == now[3].vision and alone(layout).tensor == 1
    assert share_of_step(layout, workload.most_views) == -(-layout.microbatches * workload.most_views // 4)


def test_stages_become_even_and_encoding_is_shared() -> None:
    """Four stages, a tower that trains: less waiting on all ranks, and a quarter of a step's pictures each."""
    first, every = vision_heavy(pipeline_model_parallel_size=4), vision_heavy(pipeline_model_parallel_size=4, **EVERY)
    workload = assume_workload(every)
    times = [Timer(one, layout_of(one, 64), H100, workload).step() for one in (first, every)]
    assert times[0].vision == 0 < times[1].vision
    assert times[1].bubble < 0.7 * times[0].bubble
    assert times[1].stage_seconds[0] == pytest.approx(times[1].stage_seconds[1], rel=0.08)
    one = Timer(first, layout_of(first, 64), H100, workload).vision()
    encode, home, handing = Timer(every, layout_of(every, 64), H100, workload).phases()
    microbatches = layout_of(every, 64).microbatches
    assert encode == pytest.approx(microbatches * one.forward / 4, rel=0.1)
    assert home == pytest.approx(microbatches * one.backward / 4, rel=0.15)
    assert 0 < handing < encode


def test_which_to_take_and_why() -> None:
    deep = vision_heavy(pipeline_model_parallel_size=4, tensor_model_parallel_size=2, recompute_granularity="full")
    found = of_layout(deep, 512, H100, assume_workload(deep))
    assert found.better == ALL and found.reason().startswith("all_ranks, by ")
    # Eight times as many micro-batches on a rank: what the tower keeps of them does not fit, unless it is made again.
    found = of_layout(deep, 64, H100, assume_workload(deep))
    assert found.better == FIRST and "GiB, and a plan may use" in found.reason()
    again = with_parallel(deep, vision_recompute=True, vision_placement=ALL)
    assert of_layout(again, 64, H100, assume_workload(again)).better == ALL
    flat = vision_heavy(tensor_model_parallel_size=8)
    found = of_layout(flat, 64, H100, assume_workload(flat))
    assert found.better == FIRST and found.reason().startswith("first_stage")
    # What does not fit is refused by the planner's figures.
    small = dataclasses.replace(H100, memory_bytes=H100.memory_bytes / 16)
    found = of_layout(deep, 64, small, assume_workload(deep))
    assert found.better == FIRST and "GiB, and a plan may use" in found.reason()
    auto = with_parallel(deep, vision_placement="auto")
    assert settled(auto, 512).parallel.vision_placement == ALL
    assert settled(deep, 64) is deep


SHARDS = {**EVERY, "vision_shards": "tensor"}


def test_shards_are_a_part_of_the_tower_and_stages_encode() -> None:
    sizes = {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
    whole, cut = vision_heavy(**sizes, **EVERY), vision_heavy(**sizes, **SHARDS)
    workload, layouts = assume_workload(whole), [layout_of(one, 64) for one in (whole, cut)]
    assert [layout.places for layout in layouts] == [8, 2] and [layout.vision_data for layout in layouts] == [64, 16]
    (_, all_of_it, _), (_, shard, _) = (apart_elements(r, one) for r, one in zip((whole, cut), layouts, strict=True))
    assert all_of_it / 4 < shard < all_of_it / 3.5
    before, now = (stage_memory(r, one, 1, workload) for r, one in zip((whole, cut), layouts, strict=True))
    assert now.weights < before.weights and now.gradients < before.gradients
    assert now.optimizer == pytest.approx(before.optimizer, rel=0.02)
    # A stage has four times the pictures of a rank, each on four ranks, which talk in between.
    (fast, *_), (slow, *_) = (
        Timer(r, one, H100, workload).phases() for r, one in zip((whole, cut), layouts, strict=True)
    )
    assert fast < slow < 2 * fast
    # On one stage nothing is handed over; pictures are encoded again all the same.
    one = {"tensor_model_parallel_size": 4, "sequence_parallel": True, **SHARDS}
    alone, again = (
        Timer(r, layout_of(r, 64), H100, workload).phases()
        for r in (vision_heavy(**one), vision_heavy(**one, vision_recompute=True))
    )
    assert alone[2] == again[2] == 0 and again[1] == pytest.approx(alone[1] + alone[0])


def test_pictures_that_are_encoded_ahead_lie_beside_the_pipeline() -> None:
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 4, **EVERY}
    plain = vision_heavy(**sizes)
    frozen = {part: dataclasses.replace(getattr(plain.modules, part), freeze=True) for part in ("vision", "connector")}
    plain = dataclasses.replace(plain, modules=dataclasses.replace(plain.modules, **frozen))
    ahead, workload, layout = with_parallel(plain, vision_ahead=True), assume_workload(plain), layout_of(plain, 64)
    for stage in range(4):
        before, now = (stage_memory(recipe, layout, stage, workload) for recipe in (plain, ahead))
        views = layout.microbatches * workload.views / layout.places
        pixels, features = 3 * 448**2, 256 * 4096 * 2 * workload.most_views / workload.views
        assert now.vision - before.vision == pytest.approx(views * (pixels + features), rel=1e-6)
        own = vision_bytes(ahead, layout, stage, workload.views, workload.most_views)
        assert now.buffers == before.buffers + own.passing and own.passing > 0.2 * GIB


def test_auto_cuts_what_does_not_fit_whole() -> None:
    sizes = {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 2, "recompute_granularity": "full"}
    auto = vision_heavy(**sizes, vision_placement="auto", vision_recompute=True)
    workload, gpus = assume_workload(auto), 128
    needed = [
        max(stage_memory(one, layout_of(one, gpus), stage, workload).total for stage in (0, 1))
        for one in (vision_heavy(**sizes, **keys, vision_recompute=True) for keys in (SHARDS, EVERY))
    ]
    assert needed[0] < needed[1]
    between = dataclasses.replace(H100, memory_bytes=sum(needed) / 2 / (1 - HEADROOM))
    found = of_layout(auto, gpus, between, workload)
    assert not isinstance(found.all_ranks, str) and found.all_ranks.layout.together
    assert "in shards of parallel.vision_shards" in found.reason() or found.better == FIRST
    by_name = of_layout(with_parallel(auto, **EVERY), gpus, between, workload)
    assert isinstance(by_name.all_ranks, str)


def test_what_does_not_fit_is_refused_by_name(caplog: pytest.LogCaptureFixture) -> None:
    every = vision_heavy(tensor_model_parallel_size=2, pipeline_model_parallel_size=4, **EVERY)
    workload, layout = assume_workload(every), layout_of(every, 64)
    heaviest = max(stage_memory(every, layout, stage, workload).total for stage in range(4))
    check_fits(every, 64, heaviest, on_cpu=False)
    assert not caplog.text
    with caplog.at_level("WARNING", "megavlm"):
        check_fits(every, 64, heaviest - GIB, on_cpu=False)
    assert "all_ranks may need" in caplog.text and "heaviest packs" in caplog.text
    with pytest.raises(
        RecipeError, match=r"all_ranks needs .* GiB on a rank of stage 0, which has 8.0 .*vision_shards"
    ):
        check_fits(every, 64, 8 * GIB, on_cpu=True)
    check_fits(with_parallel(every, vision_placement=FIRST), 64, 8 * GIB, on_cpu=True)
