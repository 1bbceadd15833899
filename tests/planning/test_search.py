"""What the planner proposes is right by the recipe's own rules, fits, and is as fast as the simulation says."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from tiny import tiny_recipe

from megavlm.config.checks import check_recipe
from megavlm.config.errors import RecipeError
from megavlm.config.load import load_recipe
from megavlm.config.schema import Recipe
from megavlm.families.presets import expand_presets
from megavlm.parallel.peaks import peak_flops_of
from megavlm.planning.gpus import GPUS, find_gpu
from megavlm.planning.layout import layout_of, with_parallel
from megavlm.planning.memory import predict, usable_bytes
from megavlm.planning.search import evaluate, search
from megavlm.planning.timing import Timer
from megavlm.planning.workload import assume_workload

H100 = find_gpu("h100-80g")


def big(**parallel: Any) -> Recipe:
    """The 14B with a frozen tower, trained in everything else, 448 px, packs of 2048."""
    recipe = tiny_recipe(
        model={"preset": "codefuse_vl_14b", "vision": {}, "connector": {}, "language": {}},
        data={"sequence_length": 2048},
        modules={"vision": {"freeze": True}},
        training={"precision": "bf16", "global_batch_size": 512, "train_steps": 2000},
    )
    return with_parallel(recipe, **parallel)


@pytest.mark.parametrize(
    ("name", "gpus"), [("quickstart", 2), ("quickstart", 4), ("14b", 24), ("14b", 256), ("tiny", 8)]
)
def test_every_proposed_layout_passes_the_checks(name: str, gpus: int) -> None:
    recipe = {"14b": big, "tiny": tiny_recipe}.get(name, lambda: load_recipe(name, [], expand_presets))()
    found = search(recipe, gpus, H100, assume_workload(recipe))
    assert found.plans
    for plan in found.plans:
        check_recipe(plan.recipe, gpus)
        assert plan.layout.gpus == gpus
        assert sum(plan.layout.layers_per_stage) == recipe.model.language.num_layers
        assert max(memory.total for memory in plan.memory) <= usable_bytes(H100)
    steps = [plan.time.step for plan in found.plans[:10]]
    assert steps == sorted(steps)


def test_sizes_that_do_not_fit_or_divide_are_refused_with_the_reason() -> None:
    found = search(big(), 1024, H100, assume_workload(big()))
    reasons = {(refusal.tensor, refusal.pipeline): refusal.reason for refusal in found.refusals}
    assert "512 is not divisible by the data-parallel size (1024)" in reasons[1, 1]
    found = search(big(), 8, H100, assume_workload(big()))
    reasons = {(refusal.tensor, refusal.pipeline): refusal.reason for refusal in found.refusals}
    assert "does not fit: stage 0 needs" in reasons[1, 1]
    assert not search(big(), 2, find_gpu("a100-40g"), assume_workload(big())).plans


def test_a_wrong_recipe_is_refused_whatever_the_layout() -> None:
    recipe = tiny_recipe(modules={name: {"freeze": True} for name in ("vision", "connector", "language")})
    with pytest.raises(RecipeError, match="nothing would be trained"):
        search(recipe, 4, H100, assume_workload(recipe))


def test_the_first_stage_has_fewer_layers_for_the_tower() -> None:
    plans = search(big(), 32, H100, assume_workload(big())).plans
    four = next(plan for plan in plans if plan.layout.pipeline == 4 and plan.layout.virtual is None)
    first, *rest = four.layout.layers_per_stage
    assert first < min(rest)
    # And that is no loss: nearer to the others in time than an even split is.
    even = evaluate(
        with_parallel(four.recipe, num_layers_in_first_pipeline_stage=None), 32, H100, assume_workload(big())
    )
    assert four.time.step < even.time.step
    assert even.time.stage_seconds[0] == max(even.time.stage_seconds)


def test_without_images_the_split_is_even() -> None:
    workload = assume_workload(big(), images_per_pack=0, samples_per_pack=1)
    plans = search(big(), 16, H100, workload).plans
    two = next(plan for plan in plans if plan.layout.pipeline == 2 and plan.layout.virtual is None)
    first, last = two.layout.layers_per_stage
    assert first > last  # the output layer weighs on the last


@pytest.mark.parametrize(
    ("parallel", "gpus"),
    [
        ({"pipeline_model_parallel_size": 4, "num_layers_in_first_pipeline_stage": 7}, 8),
        ({"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 5}, 8),
        ({"pipeline_model_parallel_size": 8, "virtual_pipeline_model_parallel_size": 5}, 8),
        ({"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 36}, 8),
        ({}, 8),
    ],
)
def test_a_long_step_goes_on_as_it_began(parallel: dict[str, Any], gpus: int) -> None:
    recipe = big(**parallel)
    timer = Timer(recipe, layout_of(recipe, gpus), H100, assume_workload(recipe))
    whole = timer.timeline(timer.costs(), timer.layout.microbatches)
    assert timer.step().pipeline == whole.total
    # Two stages of nearly the same time change places as the slowest late in a step.
    assert timer.step(whole=False).pipeline == pytest.approx(whole.total, rel=3e-3)
    assert timer.step(whole=False).bubble == pytest.approx(whole.bubble, abs=3e-3)
    assert timer.least() <= whole.total * (1 + 1e-9)


def test_time_and_memory_answer_to_towers_that_are_whole_on_each_rank() -> None:
    def with_tower(how: str, **tower: Any) -> tuple[Recipe, Any]:
        recipe = big(tensor_model_parallel_size=4, sequence_parallel=True)
        vision = dataclasses.replace(recipe.model.vision, tensor_parallel=how, **tower)
        modules = dataclasses.replace(recipe.modules, vision=dataclasses.replace(recipe.modules.vision, freeze=False))
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, vision=vision), modules=modules)
        return recipe, layout_of(recipe, 8)

    def seconds(how: str, images: float, **tower: Any) -> float:
        load = dataclasses.replace(assume_workload(big()), images=images, views=images)
        cost = Timer(*with_tower(how, **tower), H100, load).vision()
        return cost.forward + cost.backward

    small = {"hidden_size": 1024, "num_attention_heads": 16, "ffn_hidden_size": 4096, "num_layers": 24}
    assert seconds("replicate", 4, **small) < seconds("shard", 4, **small)  # no collectives in its layers
    assert seconds("shard", 1) < seconds("replicate", 1)  # three of four ranks wait
    assert seconds("replicate", 5) == pytest.approx(seconds("replicate", 8), rel=0.02)  # two for the busiest
    shard, whole = (predict(with_tower(how)[0], 8)[0] for how in ("shard", "replicate"))
    assert whole.weights > shard.weights and whole.gradients > shard.gradients
    timer = Timer(*with_tower("replicate"), H100, assume_workload(big()))
    assert timer.replicas() > 0 == Timer(*with_tower("shard"), H100, assume_workload(big())).replicas()


def test_time_answers_to_the_engine_and_to_short_samples() -> None:
    load = assume_workload(big())

    def step(engine: dict[str, Any], **parallel: Any) -> float:
        recipe = big(tensor_model_parallel_size=4, sequence_parallel=True, **parallel)
        recipe = dataclasses.replace(recipe, engine=dataclasses.replace(recipe.engine, **engine))
        return Timer(recipe, layout_of(recipe, 8), H100, load).step().step

    plain = step({})
    assert plain - step({"tp_comm_overlap": True}) > 0.03 * plain
    # Scaling by what a tensor itself holds reads it once more.
    delayed, current = ({"fp8": "hybrid", "fp8_recipe": name} for name in ("delayed", "tensorwise"))
    assert step(delayed) < step(current) < plain
    # Attention works on whole tiles: an operation that counts takes longer in short samples.
    recipe = big()
    one, short = (
        Timer(recipe, layout_of(recipe, 8), H100, dataclasses.replace(load, samples=samples))._attention(1e12)
        for samples in (1.0, 20.0)
    )
    assert 2 * one < short < 5 * one
    # torch's attention is Ampere's kernel, its element-wise work is not fused.
    assert step({}, transformer_impl="torch") > plain


def test_time_answers_to_what_it_should() -> None:
    workload = assume_workload(big())
    base = evaluate(big(tensor_model_parallel_size=4, sequence_parallel=True), 8, H100, workload)
    again = evaluate(
        big(tensor_model_parallel_size=4, sequence_parallel=True, recompute_granularity="full"), 8, H100, workload
    )
    assert again.time.step == pytest.approx(base.time.step * 4 / 3, rel=0.1)
    assert again.memory[0].activations < base.memory[0].activations / 5
    slower = evaluate(base.recipe, 8, find_gpu("a100-80g"), workload)
    assert slower.time.step > 2 * base.time.step
    assert 0.2 < base.time.mfu < 0.7
    assert base.gpu_hours == pytest.approx(base.time.step * 2000 * 8 / 3600)
    fewer = evaluate(base.recipe, 8, H100, assume_workload(big(), images_per_pack=1))
    assert fewer.time.step < base.time.step


@pytest.mark.parametrize(("tp", "sharing"), [(4, False), (8, True)])
def test_sharing_a_key_value_head_costs_a_gather_each_way(tp: int, sharing: bool) -> None:
    recipe = big(tensor_model_parallel_size=tp, sequence_parallel=True)
    few, many = (
        dataclasses.replace(
            recipe,
            model=dataclasses.replace(
                recipe.model, language=dataclasses.replace(recipe.model.language, num_query_groups=groups)
            ),
        )
        for groups in (4, 8)
    )
    check_recipe(few, 8)
    workload = assume_workload(recipe)
    one, other = (Timer(r, layout_of(r, 8), H100, workload).layer() for r in (few, many))
    # 40 query heads of 128, and 4 of keys and of values, of each token, in bf16.
    moved = workload.tokens * (40 + 2 * 4) * 128 * 2 * (tp - 1) / tp
    gather = moved / (H100.nvlink * H100.efficiency.nvlink) + 15e-6
    assert one.tensor_parallel - other.tensor_parallel == pytest.approx(2 * gather if sharing else 0, abs=1e-12)
    memory = [predict(r, 8)[0].weights for r in (few, many)]
    # The rows of the projection are split evenly: 8 heads of 128 less, over all ranks.
    assert memory[1] - memory[0] == 40 * 8 * 128 * 5120 * 2 // tp + 40 * 8 * 128 * 2 // tp


def test_plain_torch_and_the_plain_optimizer_need_more() -> None:
    fused, plain = predict(big(), 1), predict(big(transformer_impl="torch"), 1)
    assert plain[0].activations > 1.2 * fused[0].activations
    sharded = predict(big(use_distributed_optimizer=True), 8)[0].optimizer
    assert predict(big(use_distributed_optimizer=False), 8)[0].optimizer == pytest.approx(8 * sharded, rel=1e-6)


def test_every_stage_is_predicted() -> None:
    stages = predict(big(pipeline_model_parallel_size=4), 8, images_per_pack=3, most_images=4)
    assert len(stages) == 4
    assert stages[0].vision > 0
    assert [stage.vision for stage in stages[1:]] == [0, 0, 0]
    assert [stage.output > 0 for stage in stages] == [False, False, False, True]
    # Earlier stages have more micro-batches under way.
    assert stages[1].activations > stages[2].activations > stages[3].activations
    assert stages[0].tensors == sum(vars(stages[0]).values()) < stages[0].total


@pytest.mark.parametrize(("images", "samples"), [(8, None), (-1, None), (2, 0), (2, 4000)])
def test_a_pack_that_cannot_be_is_refused(images: float, samples: float | None) -> None:
    with pytest.raises(RecipeError, match="is not between"):
        assume_workload(big(), images, samples)


def test_gpus_say_where_their_figures_come_from() -> None:
    wanted = {"a100-40g", "a100-80g", "h100-80g", "h200-141g", "b200", "gb200"}
    assert set(GPUS) == wanted | {"l40s", "rtx-a6000", "rtx-3090", "rtx-4090", "rtx-5090"}
    for gpu in GPUS.values():
        assert "data sheet" in gpu.source
        assert gpu.bf16_flops == peak_flops_of(gpu.device, "bf16")
        # No FP8 before Ada, and a share of it where there is some.
        assert (gpu.fp8_flops is None) == (gpu.name.startswith("a100") or gpu.name in ("rtx-3090", "rtx-a6000"))
        assert gpu.fp8_flops is None or gpu.efficiency.fp8_gemm > 0


@pytest.mark.skipif("engine" not in Recipe.__dataclass_fields__, reason="recipes have no engine branch here")
def test_fp8_is_faster_and_needs_a_gpu_that_has_it() -> None:
    workload = assume_workload(big())
    half = big(tensor_model_parallel_size=4, sequence_parallel=True)
    fp8 = dataclasses.replace(half, engine=dataclasses.replace(half.engine, fp8="hybrid"))
    before, after = (evaluate(recipe, 8, H100, workload) for recipe in (half, fp8))
    assert 1.1 < before.time.step / after.time.step < 2
    assert after.memory[0].activations < before.memory[0].activations
    assert after.memory[0].buffers > before.memory[0].buffers  # FP8 copies of the weights
    with pytest.raises(RecipeError, match="a100-80g has no FP8"):
        search(fp8, 8, find_gpu("a100-80g"), workload)


def long_packs(length: int, batch: int = 16) -> Recipe:
    recipe = big()
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, sequence_length=length),
        training=dataclasses.replace(recipe.training, global_batch_size=batch),
    )


def test_long_packs_are_shared_where_nothing_else_helps() -> None:
    """Two packs a step on 16 GPUs, of 65536 tokens; packs of 2048 are never shared."""
    recipe = long_packs(65536, batch=2)
    sizes = {(4, 1), (4, 2), (8, 1)}
    found = search(recipe, 16, H100, assume_workload(recipe), among=sizes)
    assert found.plans[0].layout.context > 1
    for plan in found.plans:
        check_recipe(plan.recipe, 16)
        assert plan.layout.gpus == 16 and plan.recipe.parallel.context_parallel_size == plan.layout.context
        assert plan.layout.context <= 65536 // 8192
    short = search(big(), 16, H100, assume_workload(big()), among=sizes)
    assert {plan.layout.context for plan in short.plans} == {1}


def test_a_shared_pack_is_less_to_keep_and_quicker_but_for_what_is_handed_round() -> None:
    recipe = long_packs(65536)
    cut = {size: with_parallel(recipe, tensor_model_parallel_size=4, context_parallel_size=size) for size in (1, 2, 4)}
    load = assume_workload(recipe, images_per_pack=8, samples_per_pack=1)
    memory = {size: predict(one, 16, images_per_pack=8, samples_per_pack=1)[0] for size, one in cut.items()}
    # Four processes hold the same weights, whether they share packs or not; the embedding is made whole on each.
    assert len({(one.weights, one.gradients, one.optimizer) for one in memory.values()}) == 1
    for size in (2, 4):
        # Angles are looked up, which the fused kernel of whole packs need not keep.
        assert memory[size].activations == pytest.approx(memory[1].activations / size, rel=0.02)
        assert memory[size].vision == pytest.approx(memory[1].vision / size, rel=0.1)
    layers = {size: Timer(one, layout_of(one, 16), H100, load).layer() for size, one in cut.items()}
    for size in (2, 4):
        assert layers[1].forward / size <= layers[size].forward < layers[1].forward / size * 1.1
    # Plain torch layers gather keys and values of the pack, and keep them.
    torch = {size: with_parallel(one, transformer_impl="torch") for size, one in cut.items()}
    kept = {size: predict(one, 16, images_per_pack=8, samples_per_pack=1)[0] for size, one in torch.items()}
    assert kept[4].activations > memory[1].activations / 4
    exposed = [Timer(one, layout_of(one, 16), H100, load).layer().forward for one in (torch[1], torch[4])]
    assert exposed[1] > exposed[0] / 4
