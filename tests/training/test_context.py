"""Context parallelism trains as one process, packs with pictures, whatever their segments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from run_cases import numbers, tensors
from test_placement import MODEL, MODELS, PACKED, PP2, SHARED, SP, STEPS, TP2, VPP2
from tiny import tiny_recipe

from megavlm.config.checks import RecipeError, check_recipe

FP32, BF16 = 1e-5, 2e-2
CP2, CP3, CP4 = ({"context_parallel_size": size} for size in (2, 3, 4))
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 9000}

Case = tuple[str, int, dict[str, Any]]
CASES: dict[str, Case] = {
    "CP 2": ("plain", 2, CP2),
    "short segments at CP 2": ("plain, short", 2, CP2),
    "CP 2 x TP 2 + SP": ("plain", 4, CP2 | TP2 | SP),
}


LATENT = {"kv_lora_rank": 24, "q_lora_rank": 20, "v_head_dim": 12, "rotary_percent": 0.5, "add_qkv_bias": False}
ALL_OF = {
    **MODELS,
    # Positions of three numbers, and patches with a grid.
    "qwen2_vl": {"model": PACKED | {"language": PACKED["language"] | {"rotary_sections": (2, 3, 3)}}},
    "windows": {"model": MODEL | {"language": MODEL["language"] | {"sliding_window": 7}}},
    "prefix": {"model": MODEL | {"language": MODEL["language"] | {"attention_mask": "prefix"}}},
    "pictures both ways, windows": {
        "model": MODEL | {"language": MODEL["language"] | {"attention_mask": "images", "sliding_window": 7}}
    },
    "groups": {"model": MODEL | {"language": MODEL["language"] | {"num_query_groups": 2, "qk_layernorm": True}}},
    "latent": {"model": MODEL | {"language": MODEL["language"] | LATENT}},
    "plain optimizer": {"parallel": {"use_distributed_optimizer": False}},
    "selective": {"parallel": {"recompute_granularity": "selective"}},
}
LONG_CASES: dict[str, Case] = {
    "packed at CP 2 x PP 2": ("packed", 4, CP2 | PP2),
    "CP 2 x DP 2, overlapped": ("plain", 4, CP2 | OVERLAP),
    "CP 3": ("plain", 3, CP3),
    "short segments at CP 3 + TP": ("qwen2_vl, short", 3, CP3),
    "CP 4, short": ("groups, short", 4, CP4),
    "qwen2_vl at CP 2": ("qwen2_vl", 2, CP2),
    "qwen2_vl at CP 2 x TP 2 + SP": ("qwen2_vl", 4, CP2 | TP2 | SP),
    "CP 2 x TP 2": ("plain", 4, CP2 | TP2),
    "CP 2 x DP 2, plain optimizer": ("plain optimizer", 4, CP2),
    "short at CP 2 x PP 2 x VPP 2": ("plain, short", 4, CP2 | PP2 | VPP2),
    "recomputed at CP 2 x PP 2": ("recomputed", 4, CP2 | PP2),
    "selective at CP 2": ("selective", 2, CP2),
    "windows at CP 2, short": ("windows, short", 2, CP2),
    "windows at CP 3": ("windows", 3, CP3),
    "prefix at CP 3": ("prefix", 3, CP3),
    "pictures both ways, windows at CP 2 x TP 2 + SP": ("pictures both ways, windows", 4, CP2 | TP2 | SP),
    "five heads at CP 2 x TP 2": ("five heads", 4, CP2 | TP2 | SP),
    "norms at CP 2 x TP 2 + SP": ("norms", 4, CP2 | TP2 | SP),
    "newline at CP 2 x TP 2 + SP": ("newline", 4, CP2 | TP2 | SP),
    "deepstack at CP 2 x PP 2": ("deepstack", 4, CP2 | PP2),
    "pictures at CP 3": ("pictures", 3, CP3),
    "pictures at CP 2 x PP 2": ("pictures", 4, CP2 | PP2),
    "pictures at CP 2 x TP 2 + SP": ("pictures", 4, CP2 | TP2 | SP),
    "deepstack at CP 2 x TP 2 + SP": ("deepstack", 4, CP2 | TP2 | SP),
    **{
        f"{name} at CP 2 x DP 2, overlapped": (name, 4, CP2 | OVERLAP)
        for name in ("frozen tower", "frozen tower and connector", "frozen connector", "frozen language")
    },
    **{f"{name} at CP 2 x TP 2 + SP": (name, 4, CP2 | TP2 | SP) for name in ("adapters", "layer decay", "bf16")},
    "latent at CP 2 x TP 2 + SP": ("latent", 4, CP2 | TP2 | SP),
    "adapters at CP 2 x PP 2": ("adapters", 4, CP2 | PP2),
}
CASES_OF = CASES | LONG_CASES


def branches(name: str, parallel: dict[str, Any]) -> dict[str, Any]:
    own = ALL_OF[name]
    return {**SHARED, **own, "parallel": {**own.get("parallel", {}), **parallel}}


def job(tmp: Path, name: str, save: str, parallel: dict[str, Any]) -> dict[str, Any]:
    model, short = name.removesuffix(", short"), name.endswith(", short")
    return {
        "recipe": branches(model, parallel), "weights": str(tmp / "weights" / model / "step-00000000"),
        "save": str(tmp / save), "steps": (0, STEPS), "without": (2,), "short": short,
    }  # fmt: skip


def together(tmp: Path, cases: dict[str, Case]) -> dict[str, list[dict[str, Any]]]:
    """Run cases, and the same models in one process; return by name what each rank gave."""
    starts = [(1, {name: job(tmp, name, name, {}) for name, _, _ in cases.values()})]
    for world in sorted({world for _, world, _ in cases.values()}):
        chosen = {case: one for case, one in cases.items() if one[1] == world}
        in_turn = sorted(chosen.items(), key=lambda one: [one[1][2].get(key, 1) for key in (*CP2, *TP2, *PP2, *VPP2)])
        starts.append((world, {case: job(tmp, name, case, p) for case, (name, _, p) in in_turn}))
    found: dict[str, list[dict[str, Any]]] = {}
    for world, jobs in starts:
        by_rank = ranks.run("placement_cases:run_jobs", jobs, world=world)
        found |= {name: [given[name] for given in by_rank] for name in jobs}
    return found


def check_equal(tmp: Path, case: str, name: str, results: dict[str, list[dict[str, Any]]]) -> None:
    (expected,), near = results[name], BF16 if name == "bf16" else FP32
    for got in results[case]:
        assert got["loss"] == pytest.approx(expected["loss"], rel=near)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=near)
        assert got["validation"] == pytest.approx(expected["validation"], rel=near)
    last = f"step-{STEPS:08}"
    whole, parts = numbers(tmp / name / last), numbers(tmp / case / last)
    assert whole.keys() == parts.keys()
    for key, values in whole.items():
        rows = min(len(values), len(parts[key])) if values.dim() else None  # a vocabulary is padded
        torch.testing.assert_close(
            parts[key][:rows], values[:rows], rtol=near, atol=near, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, Any]:
    """Run what is asked for."""
    tmp = tmp_path_factory.mktemp("context")
    asked = {one.callspec.params.get("case") for one in request.session.items if hasattr(one, "callspec")}
    asked |= {"CP 2" for one in request.session.items if one.name.startswith("test_a_change")}
    return tmp, together(tmp, {case: one for case, one in CASES_OF.items() if case in asked})


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_training_equals_one_process(case: str, results: tuple[Path, Any]) -> None:
    """Losses, gradient norms, held-out losses, weights and moments, with a step in which nobody has a picture."""
    check_equal(results[0], case, CASES[case][0], results[1])


@pytest.mark.long
@pytest.mark.dist
@pytest.mark.parametrize("case", LONG_CASES)
def test_other_layouts_and_models(case: str, results: tuple[Path, Any]) -> None:
    check_equal(results[0], case, LONG_CASES[case][0], results[1])


NORMS = MODEL | {"language": MODEL["language"] | {"num_query_groups": 2, "qk_layernorm": True}}
MOE = NORMS | {
    "language": NORMS["language"]
    | {"num_moe_experts": 8, "moe_ffn_hidden_size": 32, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.01}
    | {"num_layers": 2}
}
FROZEN_FRONT = {"vision": {"freeze": True}, "connector": {"freeze": True}}
KEPT: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"training": {"precision": "bf16"}},
    "groups": {"model": MODEL | {"language": MODEL["language"] | {"num_query_groups": 2}}},
    # The norm of keys holds on to all that was projected, unless it has to make it fp32 first.
    "norms": {"model": NORMS},
    "norms, bf16": {"model": NORMS, "training": {"precision": "bf16"}},
    "norms, selective": {"model": NORMS, "parallel": {"recompute_granularity": "selective"}},
    "experts": {"model": MOE},
    "selective": {"parallel": {"recompute_granularity": "selective"}},
    "full": {"parallel": {"recompute_granularity": "full"}},
}


def kept(name: str, lengths: list[int], ranks_of: int) -> dict[str, Any]:
    own = KEPT[name]
    parallel = {"transformer_impl": "torch", **own.get("parallel", {}), "context_parallel_size": ranks_of}
    parallel["distributed_timeout_minutes"] = 7.0
    data = {"sequence_length": sum(lengths), "train": [{"path": "unused"}], "tokenizer": "unused"}
    branches = {**own, "parallel": parallel, "modules": FROZEN_FRONT, "data": data}
    found = ranks.run("context_cases:kept", branches, lengths, ranks_of, world=ranks_of)
    assert all(one == found[0] for one in found), "ranks hold unequally much"
    assert found[0]["minutes"] == 7
    return dict(found[0])


@pytest.mark.dist
@pytest.mark.parametrize("name", ["bf16", *(pytest.param(n, marks=pytest.mark.long) for n in KEPT if n != "bf16")])
def test_the_planner_counts_what_a_rank_keeps(name: str) -> None:
    got = kept(name, [200, 50, 134], 2)
    assert got["planned"] == pytest.approx(got["real"], rel=0.03)


@pytest.mark.long
@pytest.mark.dist
@pytest.mark.parametrize("name", ["fp32", "experts"])
def test_what_a_rank_keeps_of_32k_tokens(name: str) -> None:
    """All at 1/CP but keys and values of the whole pack, in each layer and in fp32.

    For these, a rank does not keep what its own were made of: queries, keys and values as projected (unless the norm of
    keys holds on to all of it), rotated keys.
    """
    tokens, norms = 32768, name != "fp32"
    width = (2 if norms else 4) * 16 * 4  # bytes of a token's keys
    own = tokens * width * (1 if norms else 4)
    whole = kept(name, [tokens], 1)
    for size in (2, 4):
        part, keys = kept(name, [tokens], size), 2 * tokens * width
        assert part["tokens"] == tokens // size
        layers = len(whole["layers"])
        assert part["layers"] == pytest.approx([(one - own) / size + keys for one in whole["layers"]], rel=0.01)
        assert part["real"] == pytest.approx((whole["real"] - layers * own) / size + layers * keys, rel=0.01)
        assert part["real"] < whole["real"] / size + layers * keys


def check_change(results: tuple[Path, Any], tmp_path: Path, world: int, layouts: dict[str, dict[str, Any]]) -> None:
    """Load and save at one layout after the other: weights and optimizer stay, to the bit."""
    load, vocabulary = results[0] / "CP 2", tiny_recipe().model.language.vocab_size
    first = tensors(load / f"step-{STEPS:08}", vocabulary)
    assert any(key.startswith("optimizer.state.exp_avg.vision.") for key in first)
    assert len(first) > 50
    jobs: dict[str, Any] = {}
    for name, parallel in layouts.items():
        jobs[name] = {
            "recipe": branches("plain", parallel), "load": str(load / f"step-{STEPS:08}"), "save": str(tmp_path / name),
            "steps": (STEPS, STEPS),
        }  # fmt: skip
        load = tmp_path / name
    ranks.run("placement_cases:run_jobs", jobs, world=world)
    for name in jobs:
        assert tensors(tmp_path / name / f"step-{STEPS:08}", vocabulary) == first, name


@pytest.mark.dist
def test_a_change_to_other_layouts_changes_no_bit(results: tuple[Path, Any], tmp_path: Path) -> None:
    check_change(results, tmp_path, 2, {"none": TP2 | SP})


@pytest.mark.long
@pytest.mark.dist
def test_a_change_of_context_parallelism_changes_no_bit(results: tuple[Path, Any], tmp_path: Path) -> None:
    check_change(results, tmp_path, 4, {"four": CP4, "stages": CP2 | PP2, "none": TP2 | SP})


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        (
            {"data": {"sequence_length": 3}},
            "cuts each sample into 4 pieces, and data.sequence_length is 3; take 1 or less",
        ),
        ({"parallel": {"vision_placement": "all_ranks"}}, "does not go with parallel.vision_placement all_ranks"),
        ({"parallel": {"vision_placement": "auto"}}, "does not go with parallel.vision_placement auto"),
        ({"engine": {"fp8": "hybrid"}, "training": {"precision": "bf16"}}, "does not go with engine.fp8"),
        ({"engine": {"cuda_graph_impl": "transformer_engine"}}, "does not go with engine.cuda_graph_impl"),
        ({"engine": {"apply_rope_fusion": "on"}}, "does not go with engine.apply_rope_fusion on"),
        ({"parallel": {"cp_comm_type": "a2a", "transformer_impl": "torch"}}, "a2a is Transformer Engine's"),
        ({"parallel": {"cp_comm_type": "a2a"}}, "a2a is Transformer Engine's"),
        (
            {"parallel": {"cp_comm_type": "a2a", **TP2, "context_parallel_size": 8}},
            r"num_query_groups \(4\) is not div",
        ),
        ({"parallel": {"cp_comm_type": "a2a", "context_parallel_size": 1}}, "has no effect without"),
    ],
)
def test_what_does_not_go_with_it_is_refused(branch: dict[str, Any], message: str) -> None:
    tiny = {
        "data": {"train": [{"path": "unused"}], "tokenizer": "unused", **branch.get("data", {"sequence_length": 96})}
    }
    recipe = tiny_recipe(**{**branch, **tiny, "parallel": {**CP2, **branch.get("parallel", {})}})
    with pytest.raises(RecipeError, match=message):
        check_recipe(recipe)


def test_it_counts_among_the_processes() -> None:
    recipe = tiny_recipe(parallel=CP3 | TP2, training={"global_batch_size": 4, "train_steps": 3, "precision": "fp32"})
    check_recipe(recipe, 12)
    with pytest.raises(RecipeError, match=r"2 x parallel.context_parallel_size \(3\) x .* = 6 does not divide the 8"):
        check_recipe(recipe, 8)
