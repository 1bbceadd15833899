"""Tower and connector on all ranks train as on the first stage and in one process, and checkpoints are the same."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from run_cases import numbers, tensors
from tiny import tiny_recipe

from megavlm.config.checks import RecipeError, check_recipe
from megavlm.planning.layout import layout_of, with_placement
from megavlm.planning.parameters import apart_elements
from megavlm.planning.placement import settled
from megavlm.training.spread import PictureSpread, picture_operations

FP32, BF16 = 1e-5, 2e-2
STEPS = 5
JOB, CUT, AHEAD = {"vision_balance": "job"}, {"vision_shards": "tensor"}, {"vision_ahead": True}
ALL, FIRST = {"vision_placement": "all_ranks"}, {"vision_placement": "first_stage"}
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
TP4, PP4 = {"tensor_model_parallel_size": 4}, {"pipeline_model_parallel_size": 4}
SP, VPP2 = {"sequence_parallel": True}, {"virtual_pipeline_model_parallel_size": 2}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 9000}
FROZEN = {"freeze": True}
STD = {"init_method_std": 0.1}
PACKED = {
    "preset": "tiny",
    "vision": {"preset": "qwen2_5_vl_vit", "patch_size": 4, "image_size": 32, "hidden_size": 32, "num_layers": 2}
    | {"num_attention_heads": 4, "ffn_hidden_size": 48, "window_size": 16, "full_attention_layers": (1,), **STD},
    "connector": {"preset": "patch_merger", **STD},
    "image": {"kind": "native"},
    "language": {"hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 4}
    | {"kv_channels": 16, "vocab_size": 512, "vocab_divisor": 1, **STD},
}
VISION = {"image_size": 32, "hidden_size": 48, "num_layers": 2, "ffn_hidden_size": 96, "num_attention_heads": 4}
VISION |= {"positional_grid": 2, "patch_size": 16, **STD}
NORMS = {"normalization": "RMSNorm", "qk_norm": "width", "layer_scale": True, "add_qkv_bias": False}
MODEL = {
    "preset": "tiny",
    "vision": VISION,
    "connector": {"preset": "mlp2x_gelu", **STD},
    "language": PACKED["language"],
}
LORA: dict[str, Any] = {"lora": {"rank": 4, "alpha": 16.0, "targets": ["c_attn", "w1"]}, "modules": {"vision": FROZEN}}
LORA["checkpoint"] = {"load": "unused"}

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "packed": {"model": PACKED},
    "newline": {"model": "tiles"},
    "deepstack": {"model": "levels"},
    "pictures": {"model": "pictures"},
    "pictures on one replica": {"model": "pictures"},
    # Megatron-Core adds up gradients of norms of queries and keys by their names, the tower's too.
    "norms": {"model": {**MODEL, "vision": VISION | NORMS, "language": MODEL["language"] | {"qk_layernorm": True}}},
    "frozen tower": {"modules": {"vision": FROZEN}},
    "frozen tower and connector": {"modules": {"vision": FROZEN, "connector": FROZEN}},
    "frozen connector": {"modules": {"connector": FROZEN}},
    "frozen language": {"modules": {"language": FROZEN}},
    "adapters": LORA,
    "layer decay": {"modules": {"vision": {"layer_decay": 0.7, "lr_multiplier": 0.5}}},
    "recomputed": {
        "model": {**MODEL, "vision": VISION | {"gradient_checkpointing": True}},
        "parallel": {"recompute_granularity": "full"},
    },
    "encoded again": {"parallel": {"vision_recompute": True}},
    "packed, encoded again": {"model": PACKED, "parallel": {"vision_recompute": True}},
    "bf16": {"training": {"precision": "bf16"}},
    # All pictures are one replica's, so that half of them move.
    "on one replica": {},
    "packed on one replica": {"model": PACKED},
    "frozen tower, on one replica": {"modules": {"vision": FROZEN}},
    "frozen, packed, on one replica": {"model": PACKED, "modules": {"vision": FROZEN, "connector": FROZEN}},
    # The tower's heads do not divide, and the connector is cut: each rank has a part of the pictures, and of gradients.
    "five heads": {"model": {**MODEL, "vision": VISION | {"num_attention_heads": 5, "hidden_size": 40}}},
}
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "TP 2": ("plain", 2, TP2),
    "PP 2": ("plain", 2, PP2),
    "PP 2 x VPP 2": ("plain", 2, PP2 | VPP2),
    "packed at TP 2 x PP 2 + SP": ("packed", 4, TP2 | PP2 | SP),
    "DP 2 x PP 2, overlapped": ("plain", 4, PP2 | OVERLAP),
    "balanced over DP 2 x PP 2, overlapped": ("on one replica", 4, PP2 | OVERLAP | JOB),
    "shards at TP 2 x PP 2 + SP": ("plain", 4, TP2 | PP2 | SP | CUT),
    "encoded ahead at TP 2 x PP 2": ("frozen tower and connector", 4, TP2 | PP2 | AHEAD),
}
LONG_CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "balanced over DP 2 x TP 2": ("packed on one replica", 4, TP2 | JOB),
    "balanced over DP 2 x PP 2, encoded again": ("packed, encoded again", 4, PP2 | JOB),
    "balanced over DP 2 x PP 2, tower frozen": ("frozen tower, on one replica", 4, PP2 | JOB),
    "balanced over DP 2 x TP 2, shards": ("on one replica", 4, TP2 | SP | JOB | CUT),
    "encoded ahead at DP 2 x PP 2, balanced": ("frozen, packed, on one replica", 4, PP2 | OVERLAP | AHEAD | JOB),
    "shards at DP 2 x TP 2, overlapped": ("plain", 4, TP2 | OVERLAP | CUT),
    "shards at TP 4": ("plain", 4, TP4 | SP | CUT),
    "packed shards at TP 2 x PP 2": ("packed", 4, TP2 | PP2 | CUT),
    "deepstack shards at TP 2 x PP 2 + SP": ("deepstack", 4, TP2 | PP2 | SP | CUT),
    "newline shards at TP 2 x PP 2 + SP": ("newline", 4, TP2 | PP2 | SP | CUT),
    "norms in shards at TP 2 x PP 2 + SP": ("norms", 4, TP2 | PP2 | SP | CUT),
    "five heads in shards at TP 2 x PP 2": ("five heads", 4, TP2 | PP2 | CUT),
    "frozen tower in shards at TP 2 x PP 2": ("frozen tower", 4, TP2 | PP2 | CUT),
    "TP 2 x PP 2 + SP": ("plain", 4, TP2 | PP2 | SP),
    "PP 4": ("plain", 4, PP4),
    "TP 4": ("plain", 4, TP4),
    "DP 2 x PP 2 x VPP 2, overlapped": ("plain", 4, PP2 | VPP2 | OVERLAP),
    "DP 2 x TP 2 + SP": ("plain", 4, TP2 | SP),
    "packed at DP 2 x PP 2, overlapped": ("packed", 4, PP2 | OVERLAP),
    "pictures at TP 2 x PP 2 + SP": ("pictures", 4, TP2 | PP2 | SP),
    "pictures at PP 2 x VPP 2 x DP 2, overlapped": ("pictures", 4, PP2 | VPP2 | OVERLAP),
    "pictures, balanced over DP 2 x TP 2, shards": ("pictures on one replica", 4, TP2 | SP | JOB | CUT),
    "newline at TP 2 x PP 2 + SP": ("newline", 4, TP2 | PP2 | SP),
    "newline at DP 2 x TP 2": ("newline", 4, TP2),
    "deepstack at TP 2 x PP 2 + SP": ("deepstack", 4, TP2 | PP2 | SP),
    "deepstack at PP 4": ("deepstack", 4, PP4),
    "recomputed at TP 2 x PP 2": ("recomputed", 4, TP2 | PP2),
    "encoded again at TP 2 x PP 2": ("encoded again", 4, TP2 | PP2),
    "packed, encoded again at DP 2 x PP 2": ("packed, encoded again", 4, PP2),
    "norms at TP 2 x PP 2 + SP": ("norms", 4, TP2 | PP2 | SP),
    "norms at DP 2 x TP 2": ("norms", 4, TP2),
    **{
        f"{name} at DP 2 x PP 2, overlapped": (name, 4, PP2 | OVERLAP)
        for name in ("frozen tower", "frozen tower and connector", "frozen connector", "frozen language")
    },
    **{
        f"{name} at TP 2 x PP 2 + SP": (name, 4, TP2 | PP2 | SP)
        for name in ("frozen tower", "frozen language", "adapters", "layer decay", "bf16")
    },
}


CASES_OF = CASES | LONG_CASES


# Gradients that are zero but for rounding (biases on all keys) make no step of Adam's whole size.
SHARED: dict[str, Any] = {"optimizer": {"lr": 1e-3, "clip_grad": 0.5, "weight_decay": 0.1, "adam_eps": 1e-4}}


def branches(name: str, parallel: dict[str, Any]) -> dict[str, Any]:
    own = MODELS[name]
    return {**SHARED, **own, "parallel": {**own.get("parallel", {}), **parallel}}


def job(tmp: Path, name: str, save: str, parallel: dict[str, Any]) -> dict[str, Any]:
    first = str(tmp / "weights" / name / "step-00000000")
    recipe, without = branches(name, parallel), (2, "one") if "one replica" in name else (2,)
    return {"recipe": recipe, "weights": first, "save": str(tmp / save), "steps": (0, STEPS), "without": without}


def together(tmp: Path, cases: dict[str, tuple[str, int, dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Run cases, and the same models in one process; return by name what each rank gave."""
    single = {name: job(tmp, name, name, FIRST | {"vision_recompute": False}) for name, _, _ in cases.values()}
    starts = [(1, single)]
    for world in sorted({world for _, world, _ in cases.values()}):
        chosen = {case: one for case, one in cases.items() if one[1] == world}
        in_turn = sorted(chosen.items(), key=lambda one: [one[1][2].get(key, 1) for key in (*TP2, *PP2, *VPP2)])
        starts.append((world, {case: job(tmp, name, case, p | ALL) for case, (name, _, p) in in_turn}))
    found: dict[str, list[dict[str, Any]]] = {}
    for world, jobs in starts:
        by_rank = ranks.run("placement_cases:run_jobs", jobs, world=world)
        found |= {name: [given[name] for given in by_rank] for name in jobs}
    return found


def check_equal(tmp: Path, case: str, name: str, results: dict[str, list[dict[str, Any]]]) -> None:
    (expected,), near = results[name], BF16 if name == "bf16" else FP32
    assert any(got["moved"] for got in results[case]) == ("balanced" in case)
    for got in results[case]:
        assert got["loss"] == pytest.approx(expected["loss"], rel=near)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=near)
        assert got["validation"] == pytest.approx(expected["validation"], rel=near)
        # On every rank, to the bit; of shards on those with the same tensor-parallel index.
        columns = results[case][: CASES_OF[case][2].get("tensor_model_parallel_size", 1)] if "shards" in case else []
        assert any(got["copies"] == one["copies"] for one in columns or results[case][:1]) and got["copies"]
        if name == "plain":
            recipe = tiny_recipe(parallel=CASES_OF[case][2] | ALL)
            kept, trained, _ = apart_elements(recipe, layout_of(recipe, CASES_OF[case][1]))
            assert got["held"] == kept + trained
        # In steps with pictures features go out, and where something learns gradients come home.
        still = all(MODELS[name].get("modules", {}).get(part) == FROZEN for part in ("vision", "connector"))
        calls, most = got["calls"], STEPS - 1
        assert calls["exchange"] == most * (1 if still else 2) or "DP" in case
        # All of them but the first, which nobody could have known of.
        assert calls.get("SideWork", 0) == (most - 1) * ("ahead" in case)
    last = f"step-{STEPS:08}"
    whole, parts = numbers(tmp / name / last), numbers(tmp / case / last)
    assert whole.keys() == parts.keys()
    assert any(key.startswith("vision.") for key in whole) or name == "adapters"
    for key, values in whole.items():
        rows = min(len(values), len(parts[key])) if values.dim() else None  # a vocabulary is padded
        torch.testing.assert_close(
            parts[key][:rows], values[:rows], rtol=near, atol=near, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """Run what ``make test`` looks at."""
    tmp = tmp_path_factory.mktemp("placement")
    return tmp, together(tmp, CASES)


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_training_equals_one_process(case: str, results: tuple[Path, dict[str, list[dict[str, Any]]]]) -> None:
    """Losses, gradient norms, held-out losses, weights and moments, with a step in which nobody has a picture."""
    check_equal(results[0], case, CASES[case][0], results[1])


@pytest.fixture(scope="module")
def long_results(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """Run the rest, as far as it is asked for."""
    tmp = tmp_path_factory.mktemp("placements")
    asked = {one.callspec.params.get("case") for one in request.session.items if hasattr(one, "callspec")}
    return tmp, together(tmp, {case: one for case, one in LONG_CASES.items() if case in asked})


@pytest.mark.long
@pytest.mark.dist
@pytest.mark.parametrize("case", LONG_CASES)
def test_other_layouts_and_models(case: str, long_results: tuple[Path, dict[str, list[dict[str, Any]]]]) -> None:
    check_equal(long_results[0], case, LONG_CASES[case][0], long_results[1])


@pytest.mark.dist
def test_a_change_of_placement_changes_no_bit(
    results: tuple[Path, dict[str, list[dict[str, Any]]]], tmp_path: Path
) -> None:
    """From all ranks to the first stage, to shards, and back, weights and optimizer, loaded and saved at once."""
    tmp, _ = results
    load, vocabulary = tmp / "PP 2", tiny_recipe().model.language.vocab_size
    first = tensors(load / f"step-{STEPS:08}", vocabulary)
    assert any(key.startswith("optimizer.state.exp_avg.vision.") for key in first)
    jobs: dict[str, Any] = {}
    for name, parallel in (("first", PP2 | FIRST), ("cut", TP2 | ALL | CUT), ("all", TP2 | ALL)):
        jobs[name] = {
            "recipe": branches("plain", parallel), "load": str(load / f"step-{STEPS:08}"), "save": str(tmp_path / name),
            "steps": (STEPS, STEPS),
        }  # fmt: skip
        load = tmp_path / name
    ranks.run("placement_cases:run_jobs", jobs, world=2)
    for name in jobs:
        assert tensors(tmp_path / name / f"step-{STEPS:08}", vocabulary) == first, name
    # What is not cut over ranks is the same too: a run of the first stage and one of all ranks write it alike.
    plain, other = (_common(tmp / name) for name in ("plain", "PP 2"))
    assert plain == other and plain["param_groups"][0]["step"] == STEPS


def _common(root: Path) -> dict[str, Any]:
    saved = torch.load(root / f"step-{STEPS:08}" / "common.pt", weights_only=False)["optimizer"]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in saved["optimizer"]["param_groups"]]
    return {"param_groups": groups, "keys": sorted(map(str, saved))}


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        ({"parallel": {"use_distributed_optimizer": False}}, "all_ranks needs parallel.use_distributed_optimizer"),
        ({"engine": {"fp8": "hybrid"}, "training": {"precision": "bf16"}}, "all_ranks does not go with engine.fp8"),
        ({"engine": {"cuda_graph_impl": "transformer_engine"}}, "all_ranks does not go with engine.cuda_graph_impl"),
        ({"parallel": {"vision_ahead": True}}, "vision_ahead: needs modules.vision.freeze"),
    ],
)
def test_what_does_not_go_with_all_ranks_is_refused(branch: dict[str, Any], message: str) -> None:
    recipe = tiny_recipe(**{**branch, "parallel": {**branch.get("parallel", {}), **ALL}})
    with pytest.raises(RecipeError, match=message):
        check_recipe(recipe)


def test_a_tower_that_no_rank_count_divides_may_be_whole_on_all() -> None:
    five = {**VISION, "num_attention_heads": 5, "hidden_size": 40, "tensor_parallel": "shard"}
    model = {**MODEL, "vision": five}
    with pytest.raises(RecipeError, match=r"model.vision.num_attention_heads: 5 is not divisible"):
        check_recipe(tiny_recipe(model=model, parallel=TP2))
    check_recipe(tiny_recipe(model=model, parallel=TP2 | ALL))
    with pytest.raises(RecipeError, match=r"model.vision.num_attention_heads: 5 is not divisible"):
        check_recipe(tiny_recipe(model=model, parallel=TP2 | ALL | CUT))
    # With auto it may be; and what it becomes is looked at again.
    auto = tiny_recipe(model=model, parallel=TP2 | {"vision_placement": "auto"}, training={"global_batch_size": 4})
    check_recipe(auto)
    assert settled(auto, 2).parallel.vision_placement == "all_ranks"
    plain = {"use_distributed_optimizer": False}
    neither = tiny_recipe(model=model, parallel=TP2 | {"vision_placement": "auto"} | plain)
    check_recipe(neither)
    with pytest.raises(RecipeError, match=r"model.vision.num_attention_heads: 5 is not divisible"):
        settled(neither, 2)


@pytest.mark.parametrize("key", [JOB, CUT, {"vision_ahead": True}, {"vision_recompute": True}])
def test_keys_of_all_ranks_are_refused_on_the_first_stage(key: dict[str, Any]) -> None:
    frozen = {"vision": FROZEN, "connector": FROZEN}
    with pytest.raises(RecipeError, match=f"parallel.{next(iter(key))}: needs parallel.vision_placement all_ranks"):
        check_recipe(tiny_recipe(parallel=key, modules=frozen))
    every = tiny_recipe(parallel=key | ALL, modules=frozen)
    check_recipe(every)
    check_recipe(with_placement(every, "first_stage"))


def test_pictures_are_spread_by_their_cost() -> None:
    """One huge picture takes a rank alone; alike ones go around; the same wherever it is asked."""
    packed = tiny_recipe(model=PACKED, parallel=PP2 | TP2 | ALL)
    huge, small = [1, 24, 24], [1, 4, 4]
    (owners,) = PictureSpread(packed)([[[small, huge], [], [small] * 6]])
    assert [len(one) for one in owners] == [2, 0, 6]
    alone = owners[0][1]
    assert [owner for one in owners for owner in one].count(alone) == 1
    assert [owners] == PictureSpread(packed)([[[small, huge], [], [small] * 6]])
    film, frame = picture_operations(packed.model, (4, 8, 8)), picture_operations(packed.model, (1, 8, 8))
    assert film == pytest.approx(4 * frame)  # frames do not look at each other
    (alike,) = PictureSpread(tiny_recipe(parallel=PP2 | ALL))([[[None] * 3, [None] * 2]])
    assert sorted(owner for one in alike for owner in one) == [0, 0, 0, 1, 1]
    (cut,) = PictureSpread(tiny_recipe(parallel=PP2 | TP2 | ALL | CUT))([[[None] * 4]])
    assert sorted(cut[0]) == [0, 0, 1, 1]  # stages


def test_only_what_a_replica_has_too_much_moves() -> None:
    spread = PictureSpread(tiny_recipe(parallel=PP2 | ALL | JOB))
    (one, two), (three,) = spread([[[None] * 4, [None] * 4], [[None] * 4]])
    assert sorted(one + two) == [0, 0, 0, 1, 1, 1, 2, 3] and sorted(three) == [2, 2, 3, 3]
    # What is even stays, whatever the order.
    even = spread([[[None] * 2, [None] * 2], [[None] * 4, []]])
    assert {place for pack in even[0] for place in pack} == {0, 1} and set(even[1][0]) == {2, 3}
    assert spread([[[]], [[]]]) == [[[]], [[]]]
    packed = PictureSpread(tiny_recipe(model=PACKED, parallel=PP2 | ALL | JOB))
    rng = random.Random(3)
    for _ in range(20):
        grids = [[[[1, 4 * rng.randint(1, 6), 4] for _ in range(rng.randint(0, 9))]] for _ in range(3)]
        loads, dearest = [0.0] * 6, 0.0
        for (sizes,), (places,) in zip(grids, packed(grids), strict=True):
            for grid, place in zip(sizes, places, strict=True):
                cost = picture_operations(packed_model(), tuple(grid))
                loads[place], dearest = loads[place] + cost, max(dearest, cost)
        assert max(loads) <= max(sum(loads) / 6, dearest) * 4 / 3 + 1e-6


def packed_model() -> Any:
    return tiny_recipe(model=PACKED).model
