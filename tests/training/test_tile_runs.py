"""Pictures cut into tiles through the commands: train, go on, panel, validation, generate, eval, inspect, plan."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import ranks
from PIL import Image
from run_data import RunData

from megavlm.cli import main

pytestmark = pytest.mark.long

ANYRES = (
    "model.connector={preset: mlp2x_gelu}",
    "model.vision.image_size=16",
    "model.image={kind: anyres, pinpoints: [[16, 32], [32, 16], [32, 32]]}",
    "data.sequence_length=224",
    "training.validation_interval=2",
    "logging.panel_interval=2",
    "checkpoint.save_interval=2",
)


def test_a_run_of_tiles_through_every_command(
    run_data: RunData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = (
        "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2",
        "parallel.sequence_parallel=true",
    )  # fmt: skip
    steps = "optimizer.schedule=constant"
    words = run_data.words(tmp_path / "run", *ANYRES, steps)
    ranks.megavlm([*words, "training.train_steps=3"], world=1)
    shutil.copytree(tmp_path / "run", tmp_path / "wide")
    ranks.megavlm([*words, "training.train_steps=6"], world=1)
    wide_words = run_data.words(tmp_path / "wide", *ANYRES, *layout, steps)
    ranks.megavlm([*wide_words, "training.train_steps=6"], world=4)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "wide")
    ]
    compared = set()
    for alone, wide in zip(*lines, strict=True):
        assert {"loss", "validation_loss"} & alone.keys() == {"loss", "validation_loss"} & wide.keys()
        for key in {"loss", "validation_loss"} & alone.keys():
            assert wide[key] == pytest.approx(alone[key], rel=1e-4)
            compared.add(key)
        if "views_per_second" in alone:
            views, images = (alone[f"{one}_per_second"] for one in ("views", "images"))
            assert wide["views_per_second"] / wide["images_per_second"] == pytest.approx(views / images)
            assert views > 2 * images
    assert compared == {"loss", "validation_loss"}
    # The pictures of this data set are square; others are asked about here.
    picture = tmp_path / "wide.png"
    Image.effect_noise((90, 30), 80).convert("RGB").save(picture)
    ask = ["generate", "--image", str(picture), "--prompt", "What is this?", "--max-new-tokens=6"]
    answers = [
        ranks.megavlm([*ask, str(tmp_path / "wide"), *more], world=world, apart=True).stdout
        for more, world in (((), None), (layout, 4))
    ]
    assert answers[0] == answers[1] and answers[0].strip()
    narrow = tmp_path / "narrow.png"
    Image.new("RGB", (1, 10000)).save(narrow)
    ranks.megavlm(["generate", str(tmp_path / "run"), "--image", str(narrow), "--prompt", "?", "--max-new-tokens=2"])
    done = ranks.megavlm(
        ["generate", str(tmp_path / "run"), "--image", str(narrow), "--prompt", "?", "--max-new-tokens=2",
         "model.image={kind: crop}"], check=False,
    )  # fmt: skip
    assert done.code == 2 and done.stderr.count("\n") <= 2
    # A plan without a newline vector is another model.
    again = [*words, "model.image={kind: squash}", "training.train_steps=9"]
    done = ranks.megavlm(again, world=1, check=False)
    assert done.code == 2
    assert "model.image.kind: 'squash', but" in done.stdout + done.stderr

    page = tmp_path / "page.html"
    recipe = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1] / "recipe.yaml"
    assert main(["inspect", "--recipe", str(recipe), "--out", str(page), "--samples", "2", "--packs", "1"]) == 0
    assert "views" in page.read_text()
    assert main(["plan", str(recipe), "--gpus", "1", "--picture-size", "90x30"]) == 0
    assert "views" in capsys.readouterr().out
