"""The optimizer's state goes on bit for bit: padded buckets at any data-parallel size, frozen parts, the other kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
from run_cases import alike, tensors
from test_proof import MODEL

VOCABULARY = 517
HALF, END = "step-00000002", "step-00000003"
PP2 = {"pipeline_model_parallel_size": 2}
UNTIED = {**MODEL, "language": {**MODEL["language"], "tie_word_embeddings": False}}
SMALL = {**UNTIED, "language": {**UNTIED["language"], "num_layers": 2}}
LORA = {"rank": 4, "targets": ["c_attn", "w1", "mlp.c_proj"], "train_embeddings": True}
FROZEN = {"vision": {"freeze": True}, "language": {"freeze": True}}


def buckets(size: int, *, gather: bool = False) -> dict[str, Any]:
    return {"overlap_grad_reduce": True, "overlap_param_gather": gather, "ddp_bucket_size": size}


def recipe(parallel: dict[str, Any], replicas: int, model: dict[str, Any] = MODEL, **more: Any) -> dict[str, Any]:
    training = {"global_batch_size": replicas, "precision": "bf16", **more.pop("training", {})}
    return {"model": model, "parallel": parallel, "training": training, **more}


# A run, and the data-parallel size and layout that its checkpoint is loaded at besides.
RUNS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "dp3-tied": (3, recipe(buckets(5000), 3), recipe({}, 3)),
    "dp5-gathered": (5, recipe(buckets(3000, gather=True), 5, UNTIED, training={"precision": "fp32"}), recipe({}, 5)),
    "dp3-pp2-tied": (6, recipe(PP2, 3), recipe(buckets(3000), 6)),
    "dp3-pp2-vpp2": (
        6,
        recipe({**PP2, "virtual_pipeline_model_parallel_size": 2, **buckets(4000, gather=True)}, 6),
        recipe({"tensor_model_parallel_size": 2}, 3),
    ),
    "dp6": (6, recipe(buckets(1), 6, SMALL), recipe({}, 6)),  # every parameter has its bucket
    "dp3-frozen": (3, recipe(buckets(500), 3, modules=FROZEN), recipe({}, 3)),
    "dp12": (12, recipe(buckets(2000), 12, SMALL), recipe({}, 12)),
}


LONG = ("dp6", "dp12")  # many ranks


def go_on(run: str, first: dict[str, Any], second: dict[str, Any], world: int, root: Path) -> None:
    """Train, resume in the same way, and load in another way; all bit for bit."""
    second = {**first, "parallel": second["parallel"]}
    one, again, other = (root / name for name in ("one", "again", "other"))
    todo = [
        (first, str(one), None, (2, 3)),
        (first, str(again), str(one / HALF), (3,)),
        (second, str(other), str(one / HALF), (2,)),
    ]
    losses, resumed, _ = ranks.run("run_cases:jobs", todo, world=world)[-1]
    assert resumed == losses[-1:], run
    assert alike(again / END, one / END, VOCABULARY)
    found = tensors(one / HALF, VOCABULARY)
    assert tensors(other / HALF, VOCABULARY) == found
    assert any(".exp_avg." in key for key in found) and any(".param." in key for key in found)


@pytest.mark.dist
@pytest.mark.parametrize("run", [pytest.param(run, marks=[pytest.mark.long] if run in LONG else []) for run in RUNS])
def test_padded_buckets(run: str, tmp_path: Path) -> None:
    world, first, second = RUNS[run]
    go_on(run, first, second, world, tmp_path)


@pytest.mark.dist
def test_padded_buckets_of_adapters(tmp_path: Path) -> None:
    whole = recipe({}, 3, UNTIED)
    ranks.run("run_cases:train", whole, str(tmp_path / "base"), None, (0,), world=3)
    (base,) = (tmp_path / "base").glob("step-*")
    more = {"lora": LORA, "checkpoint": {"load": str(base)}, "modules": {"vision": {"freeze": True}}}
    first, second = (recipe(parallel, 3, UNTIED, **more) for parallel in (buckets(300), {}))
    go_on("lora", first, second, 3, tmp_path)


@pytest.mark.dist
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world", [1, 3])
def test_the_other_optimizer_goes_on(world: int, precision: str, tmp_path: Path) -> None:
    """From the distributed optimizer to the plain one and back: the same masters and moments, and steps alike."""
    training = {"precision": precision}
    distributed = recipe(buckets(5000), world, training=training)
    plain = recipe({"use_distributed_optimizer": False}, world, training=training)
    one, over, back, on, plainly = (tmp_path / name for name in ("one", "over", "back", "on", "plainly"))
    todo = [
        (distributed, str(one), None, (2, 3)),
        (plain, str(over), str(one / HALF), (2,)),
        (distributed, str(back), str(over / HALF), (2, 3)),
        (plain, str(on), str(one / HALF), (3,)),
        (plain, str(plainly), None, (2,)),
    ]
    losses, _, returned, went_on, _ = ranks.run("run_cases:jobs", todo, world=world)[-1]
    assert returned == losses[-1:] and went_on == pytest.approx(losses[-1:], rel=1e-6)
    start = tensors(one / HALF, VOCABULARY)
    assert tensors(back / HALF, VOCABULARY) == start and alike(back / END, one / END, VOCABULARY)
    there = tensors(over / HALF, VOCABULARY)
    assert there.keys() == tensors(plainly / HALF, VOCABULARY).keys()  # as if it had been the plain one from the start
    assert all(start[key] == value for key, value in there.items())
    assert any(".exp_avg_sq." in key for key in there) and (precision == "fp32") != any(
        ".param." in key for key in there
    )
