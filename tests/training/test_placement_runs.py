"""Whole runs whose pictures all ranks encode: figures, resumption, answers, and ranks that die in each phase."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ranks
from launch import under_torchrun
from PIL import Image
from run_data import RunData

from megavlm.config.checks import check_recipe
from megavlm.config.help import to_tree, to_yaml
from megavlm.inference.checkpoint import recipe_at_layout
from megavlm.parallel.faults import VARIABLE
from megavlm.planning.gpus import find_gpu
from megavlm.planning.layout import with_parallel, with_placement
from megavlm.planning.placement import of_layout, record, settled
from megavlm.planning.workload import assume_workload

ALL = "parallel.vision_placement=all_ranks"
FIRST = "parallel.vision_placement=first_stage"
TP2 = "parallel.tensor_model_parallel_size=2"
PP2 = "parallel.pipeline_model_parallel_size=2"
SAVES = (
    "checkpoint.save_interval=2",
    "optimizer.warmup_steps=1",
    "optimizer.schedule=constant",
    "logging.timing_interval=1",
)


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
@pytest.mark.dist
def test_a_run_through_every_phase(run_data: RunData, tmp_path: Path) -> None:
    """Begun on the first stage, gone on with on all ranks, and back: losses and held-out losses as uninterrupted."""
    more = (*SAVES, "training.validation_interval=2", "logging.panel_interval=2")
    ranks.megavlm(run_data.words(tmp_path / "whole", *more, PP2), world=2)
    for steps, world, words in ((2, 2, (PP2,)), (4, 4, (PP2, TP2, ALL)), (6, 2, (TP2, ALL))):
        run = [*run_data.words(tmp_path / "run", *more, *words), f"training.train_steps={steps}"]
        ranks.megavlm(run, world=world)
    compared = 0
    for alone, moved in zip(lines(tmp_path / "whole"), lines(tmp_path / "run"), strict=True):
        for key in {"loss", "validation_loss", "grad_norm"} & alone.keys():
            assert moved[key] == pytest.approx(alone[key], rel=1e-4), (key, moved["step"])
            compared += 1
        if "timed_step_seconds" in moved:
            assert ("vision_fraction" in moved) == (moved["step"] > 2)
        if "vision_fraction" in moved:
            assert moved["vision_encode_seconds"] > 0 and moved["vision_backward_seconds"] > 0
            assert 0 <= moved["vision_lost_fraction"] < moved["vision_fraction"] < 1 <= moved["vision_imbalance"]
            parts = moved["data_seconds"] + moved["schedule_seconds"] + moved["update_seconds"]
            assert parts < moved["timed_step_seconds"]
    assert compared > 12
    picture = tmp_path / "picture.png"
    Image.effect_noise((40, 30), 80).convert("RGB").save(picture)
    ask = [
        "generate",
        "--image",
        str(picture),
        "--prompt",
        "What is this?",
        "--max-new-tokens=6",
        str(tmp_path / "run"),
    ]
    answers = [
        ranks.megavlm([*ask, *words], world=world, apart=True).stdout
        for words, world in (((FIRST,), None), ((ALL, PP2, TP2), 4))
    ]
    assert answers[0] == answers[1] and answers[0].strip()


FROZEN = ("modules.vision.freeze=true", "modules.connector.freeze=true")
AHEAD = (ALL, "parallel.vision_ahead=true")


@pytest.mark.long
@pytest.mark.dist
def test_a_run_that_encodes_ahead_goes_on_where_it_stood(run_data: RunData, tmp_path: Path) -> None:
    """Frozen tower: losses as on the first stage, with a stop between two steps, and pictures of both replicas."""
    more = (*SAVES, *FROZEN, "training.validation_interval=2", "training.global_batch_size=4")
    ranks.megavlm(run_data.words(tmp_path / "whole", *more, PP2), world=4)
    for steps, words in ((4, AHEAD), (6, (*AHEAD, "parallel.vision_balance=job"))):
        run = [*run_data.words(tmp_path / "run", *more, PP2, *words), f"training.train_steps={steps}"]
        ranks.megavlm(run, world=4)
    assert [one["step"] for one in lines(tmp_path / "run")] == [one["step"] for one in lines(tmp_path / "whole")]
    for alone, moved in zip(lines(tmp_path / "whole"), lines(tmp_path / "run"), strict=True):
        for key in {"loss", "validation_loss", "grad_norm"} & alone.keys():
            assert moved[key] == pytest.approx(alone[key], rel=1e-4), (key, moved["step"])
        if "images_per_second" in moved:
            assert ("vision_moved_fraction" in moved) == (moved["step"] > 4)
    *_, last = (one for one in lines(tmp_path / "run") if "timed_step_seconds" in one)
    assert 0 <= last["vision_moved_fraction"] <= 1 <= last["vision_job_imbalance"]
    assert last["vision_backward_seconds"] == 0


@pytest.mark.dist
def test_what_does_not_fit_is_refused_before_anything_is_built(run_data: RunData, tmp_path: Path) -> None:
    """By the planner's figures: a tower of some 77 thousand million parameters."""
    huge = ("model.vision.ffn_hidden_size=4000000", "model.vision.num_layers=200")
    done = ranks.megavlm(run_data.words(tmp_path / "run", *huge, ALL, PP2), world=2, check=False)
    assert done.code == 2, done.stdout
    assert "parallel.vision_placement: all_ranks needs" in done.stdout
    assert "set parallel.vision_recompute to true, or parallel.vision_placement to first_stage" in done.stdout
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.reliability
@pytest.mark.dist
@pytest.mark.parametrize("point", ["vision.encode", "step.forward", "vision.backward", "vision.encode ahead"])
def test_a_rank_that_dies_in_a_phase_is_named(point: str, run_data: RunData, tmp_path: Path) -> None:
    point, _, ahead = point.partition(" ")
    more = (*FROZEN, *AHEAD) if ahead else (ALL,)
    words = run_data.words(tmp_path / "run", *SAVES, PP2, *more, "parallel.distributed_timeout_minutes=0.2")
    code, text = under_torchrun(
        ["-m", "megavlm", *words], ranks=2, restarts=0, env={VARIABLE: f"{point}:rank1:step3:kill"}, timeout=600
    )
    assert code != 0
    assert "step 3: lost rank 1 (host " in text, text


def test_auto_is_settled_by_the_plan(run_data: RunData, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = run_data.recipe(tmp_path, "parallel.vision_placement=auto", PP2)
    with caplog.at_level("INFO", "megavlm"):
        found = settled(recipe, 2)
    assert found.parallel.vision_placement in ("first_stage", "all_ranks")
    assert f"parallel.vision_placement: {found.parallel.vision_placement}" in caplog.text
    rest = to_tree(found)
    rest["parallel"]["vision_placement"] = "auto"
    assert rest == to_tree(recipe)
    # What all ranks cannot do is left to the first stage, with the reason.
    plain = run_data.recipe(tmp_path, "parallel.vision_placement=auto", "parallel.use_distributed_optimizer=false")
    with caplog.at_level("INFO", "megavlm"):
        assert settled(plain, 2).parallel.vision_placement == "first_stage"
    assert "all_ranks needs parallel.use_distributed_optimizer" in caplog.text


def test_what_auto_was_settled_to_stays_when_a_run_goes_on(
    run_data: RunData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A planner that has learned more changes no run at its layout; a run at another one is planned anew."""
    auto = "parallel.vision_placement=auto"
    recipe = run_data.recipe(tmp_path / "run", auto, PP2)
    begun = settled(recipe, 2)
    settled_to = {"vision_placement_auto": begun.parallel.vision_placement, "vision_shards_auto": "whole"}
    assert record(recipe, begun) == settled_to
    assert record(begun, begun) == {}
    other = "first_stage" if begun.parallel.vision_placement == "all_ranks" else "all_ranks"
    saved = tmp_path / "run" / "checkpoints" / "step-00000002"
    saved.mkdir(parents=True)
    changed = with_placement(begun, other)
    (saved / "recipe.yaml").write_text(to_yaml(changed), encoding="utf-8")
    run = {"world_size": 2, **record(recipe, changed)}
    (saved / "run.json").write_text(json.dumps(run), encoding="utf-8")
    caplog.set_level("INFO", "megavlm")
    assert settled(recipe, 2) == changed and "as the run was planned when it began" in caplog.text
    cut = with_parallel(with_placement(begun, "all_ranks"), vision_shards="tensor")
    (saved / "run.json").write_text(json.dumps({"world_size": 2, **record(recipe, cut)}), encoding="utf-8")
    assert settled(recipe, 2) == cut
    caplog.clear()
    # Shards do not go with encoding ahead, which is asked for now: not what was, whatever is planned.
    still = run_data.recipe(tmp_path / "run", auto, TP2, *FROZEN, "parallel.vision_ahead=true")
    (saved / "recipe.yaml").write_text(to_yaml(with_parallel(still, vision_ahead=False)), encoding="utf-8")
    (saved / "run.json").write_text(json.dumps({"world_size": 2, **record(recipe, cut)}), encoding="utf-8")
    check_recipe(settled(still, 2), 2)
    # And shards that are asked for now are made, though there were none.
    (saved / "recipe.yaml").write_text(to_yaml(changed), encoding="utf-8")
    whole = record(recipe, with_placement(recipe, "all_ranks"))
    (saved / "run.json").write_text(json.dumps({"world_size": 2, **whole}), encoding="utf-8")
    assert settled(with_parallel(recipe, vision_shards="tensor"), 2) == cut
    caplog.clear()
    for words, world in (((TP2,), 2), ((PP2,), 4), ((PP2, "checkpoint.resume=false"), 2)):
        settled(run_data.recipe(tmp_path / "run", auto, *words), world)
    # It was chosen by hand then.
    (saved / "run.json").write_text('{"world_size": 2}', encoding="utf-8")
    assert settled(recipe, 2) == begun
    assert "as the run was planned when it began" not in caplog.text


def test_encoding_again_goes_with_all_ranks_alone(run_data: RunData, tmp_path: Path) -> None:
    """``auto`` weighs both placements whatever the key says, and what it leaves is a recipe that is taken again."""
    again = ("parallel.vision_placement=auto", "parallel.vision_recompute=true")
    recipe = run_data.recipe(tmp_path, *again, "parallel.use_distributed_optimizer=false")
    found = settled(recipe, 1)
    assert found.parallel.vision_placement == "first_stage" and not found.parallel.vision_recompute
    check_recipe(found, 1)
    recipe = run_data.recipe(tmp_path, *again)
    workload = assume_workload(recipe)
    placements = of_layout(recipe, 1, find_gpu("h100-80g"), workload)
    assert not isinstance(placements.first_stage, str), placements.first_stage
    # Answers are the first stage's to give, whatever a checkpoint's run had done.
    (tmp_path / "recipe.yaml").write_text(to_yaml(with_parallel(recipe, vision_placement="all_ranks")), "utf-8")
    parallel = recipe_at_layout(tmp_path, ()).parallel
    assert parallel.vision_placement == "first_stage" and not parallel.vision_recompute
