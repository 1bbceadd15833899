"""The order of a step's micro-batches: never slower than that of reading, the same sums, the same work."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from samples import recipe
from step_cases import share
from tiny import IMAGE_TOKEN, SEQUENCE_LENGTH, tiny_recipe

from megavlm.config.schema import ParallelConfig, Recipe
from megavlm.data.media import plan_of
from megavlm.parallel.state import process_groups
from megavlm.planning.flops import step_flops
from megavlm.planning.layout import stage_layers
from megavlm.planning.weighing import weigher_of
from megavlm.training.build import build_training
from megavlm.training.order import StepOrder, candidates
from megavlm.training.step import train_step

FREEZE = {"freeze": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "pp 2": {"pipeline_model_parallel_size": 2},
    "pp 4, uneven": {"pipeline_model_parallel_size": 4, "num_layers_in_first_pipeline_stage": 1},
    "pp 2 x 2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
}
TRAINED: dict[str, dict[str, Any]] = {
    "all": {},
    "frozen tower": {"vision": FREEZE},
    "connector alone": {"vision": FREEZE, "language": FREEZE},
    "language alone": {"vision": FREEZE, "connector": FREEZE},
}


def laid_out(layout: str, trained: str = "all") -> Recipe:
    model = {
        "preset": "tiny",
        # An image is about a third of the work of a language layer.
        "vision": {"image_size": 56, "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4},
        "language": {"num_layers": 7 if "uneven" in layout else 4},
    }
    return tiny_recipe(model=model, parallel=LAYOUTS[layout], modules=TRAINED[trained])


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_work_of_all_stages_is_that_of_the_step(layout: str, trained: str) -> None:
    own, images = laid_out(layout, trained), [3, 1, 2]
    work = sum(sum(map(sum, times)) for times in StepOrder(own).work(images))
    tokens = len(images) * SEQUENCE_LENGTH
    assert work * 1e12 == pytest.approx(step_flops(own, tokens, tokens * SEQUENCE_LENGTH, sum(images)))
    assert sum(stage_layers(own)) == own.model.language.num_layers


def test_a_tower_that_each_rank_holds_whole_counts_the_rank_with_most_pictures() -> None:
    cut, whole = (
        tiny_recipe(
            model={"preset": "tiny", "vision": {"tensor_parallel": how}},
            parallel={"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2},
        )
        for how in ("shard", "replicate")
    )
    assert StepOrder(whole).work([1, 4, 5]) == StepOrder(cut).work([4, 4, 8])


def test_where_the_work_is() -> None:
    forward, backward = StepOrder(laid_out("pp 4, uneven", "frozen tower")).work([0, 2, 4])
    assert [row[1:] for row in forward] == [forward[0][1:]] * 3 and forward[2][0] > forward[1][0] > forward[0][0]
    # The connector learns: without an image, one empty picture is run.
    assert StepOrder(laid_out("pp 2", "frozen tower")).work([0]) == StepOrder(laid_out("pp 2", "frozen tower")).work(
        [1]
    )
    assert StepOrder(laid_out("pp 2", "language alone")).work([0]) != StepOrder(
        laid_out("pp 2", "language alone")
    ).work([1])
    # Two layers in the second stage, one in the first, and the last has the output layer as well.
    assert forward[0][1] == forward[0][2] < forward[0][3] and backward[0][1] == pytest.approx(2 * forward[0][1])
    full = {"recompute_granularity": "full"}
    again = tiny_recipe(model={"preset": "tiny"}, parallel=LAYOUTS["pp 2"] | full)
    plain = tiny_recipe(model={"preset": "tiny"}, parallel=LAYOUTS["pp 2"])
    assert StepOrder(again).work([1])[1][0][0] > StepOrder(plain).work([1])[1][0][0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_order_is_one_of_all_packs_and_never_slower(layout: str) -> None:
    order, rng, gained = StepOrder(laid_out(layout)), random.Random(4), 0
    for _ in range(40):
        images = [rng.randrange(5) for _ in range(8)]
        chosen = order(images)
        assert sorted(chosen) == list(range(8)) and chosen == order(images)
        before, after = order.seconds(images), order.seconds([images[index] for index in chosen])
        assert after <= before
        gained += after < 0.99 * before
    assert gained > 10
    assert order([2] * 8) == list(range(8))


def test_candidates_are_orders() -> None:
    rng = random.Random(5)
    for count in range(1, 13):
        images = [rng.randrange(4) for _ in range(count)]
        orders = list(candidates(images))
        assert all(sorted(one) == list(range(count)) for one in orders)
        assert orders[0] == list(range(count))


def test_without_a_pipeline_the_order_is_that_of_reading() -> None:
    assert StepOrder(tiny_recipe())([3, 0, 2, 1]) == [0, 1, 2, 3]


def test_a_step_is_the_same_in_any_order() -> None:
    images = [2, 0, 1, 3]
    results = []
    with process_groups(ParallelConfig(), seed=1):
        for order in ([0, 1, 2, 3], StepOrder(laid_out("pp 2"))(images), [3, 2, 1, 0]):
            torch.manual_seed(0)
            training = build_training(recipe(), IMAGE_TOKEN)
            training.scheduler.step(1)
            batches = [share(10 + index, images[index], 9 * index + 3) for index in order]
            step = train_step(training.chunks, training.optimizer, batches, num_sources=1)
            weights = torch.cat([p.detach().flatten() for p in training.modules[0].parameters()])
            results.append((order, step, weights))
    assert len({tuple(order) for order, _, _ in results}) == 3
    _, first, weights = results[0]
    for _, step, other in results[1:]:
        assert step.loss == pytest.approx(first.loss, rel=1e-6)
        assert step.grad_norm == pytest.approx(first.grad_norm, rel=1e-5)
        assert step.supervised_tokens == first.supervised_tokens
        torch.testing.assert_close(other, weights, rtol=1e-4, atol=1e-5)


PACKED = {
    "preset": "tiny",
    "vision": {
        "preset": "qwen2_vl_vit_675m", "hidden_size": 64, "num_layers": 2, "num_attention_heads": 4,
        "ffn_hidden_size": 128, "patch_size": 4, "image_size": 32,
    },
    "connector": {"preset": "patch_merger"},
    "image": {"kind": "native"},
}  # fmt: skip


def test_pictures_of_any_size_weigh_by_what_the_tower_does_with_them() -> None:
    """One picture of 32 x 32 patches is more than 16 of 8 x 8, and a film's frames are so many pictures."""
    own = tiny_recipe(model=PACKED, parallel=LAYOUTS["pp 2"])
    order = StepOrder(own)
    large, small, film = [(1, 32, 32)], [(1, 8, 8)] * 16, [(16, 8, 8)]
    assert order.weight(large) > 1.1 * order.weight(small) == pytest.approx(1.1 * order.weight(film))
    (alone, first), _ = order.work([large, [(1, 8, 8)]])
    squared = 4 * 64 * 2 * 1024**2 / 1e12  # scores, and their product with the values, in two layers
    patch = order.work([small])[0][0][0] - alone[0] + squared - 4 * 64 * 2 * 16 * 64**2 / 1e12
    assert patch == pytest.approx(0, abs=1e-9) and alone[1:] == first[1:]
    # Of a micro-batch without pictures, and of one with an empty one, the same runs.
    assert order.work([0]) == order.work([[(1, 2, 2)]])
    steps = [large, small, [(1, 4, 4)], [(1, 8, 8)]]
    chosen = order(steps)
    assert sorted(chosen) == [0, 1, 2, 3]
    assert order.seconds([steps[index] for index in chosen]) <= order.seconds(steps)


def test_of_a_whole_tower_on_each_rank_the_one_with_most_patches_counts() -> None:
    cut, whole = (
        StepOrder(
            tiny_recipe(
                model={**PACKED, "vision": {**PACKED["vision"], "tensor_parallel": how}},
                parallel={"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
            )
        )
        for how in ("shard", "replicate")
    )
    # 16 x 16 in front goes to the first rank, the others to the second.
    uneven, busiest = [(1, 16, 16), (1, 8, 8), (1, 4, 4)], [(1, 16, 16)] * 2
    assert whole.work([uneven])[0][0] == pytest.approx(cut.work([busiest])[0][0])


def test_samples_are_weighed_in_halves_of_the_usual_picture() -> None:
    own = tiny_recipe(model=PACKED)
    plan, weigh = plan_of(own.model), weigher_of(own)
    assert weigh is not None and weigh([]) == 0
    usual, large = plan.plan(32, 32), plan.plan(128, 128)
    assert weigh([usual]) == 2 and weigh([usual] * 3) == 6
    assert weigh([large]) > 2 * 16, "attention grows with the square"
    assert weigher_of(tiny_recipe()) is None  # counted
    assert weigher_of(tiny_recipe(model=PACKED, data={"balance_images": False})) is None
