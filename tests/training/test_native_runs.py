"""Pictures of their own size through the commands: prepare, train, go on, panel, generate, inspect, plan."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import ranks
from PIL import Image
from run_data import RunData

from megavlm.cli import main

pytestmark = pytest.mark.long

TOWER = (
    "model.vision={preset: qwen2_5_vl_vit, patch_size: 4, window_size: 24, full_attention_layers: [1], hidden_size: 48,"
    " num_layers: 2, num_attention_heads: 4, ffn_hidden_size: 64, image_size: 32, init_method_std: 0.1}"
)
NATIVE = (
    TOWER,
    "model.connector={preset: patch_merger, normalization: RMSNorm, init_method_std: 0.1}",
    "model.language.rotary_sections=[2, 3, 3]",
    "model.image={kind: native, min_pixels: 256, max_pixels: 2048, total_pixels: 3072}",
    "training.validation_interval=2",
    "logging.panel_interval=2",
    "checkpoint.save_interval=2",
    "optimizer.schedule=constant",
)
WIDE = (
    "parallel.tensor_model_parallel_size=2",
    "parallel.pipeline_model_parallel_size=2",
    "parallel.sequence_parallel=true",
)
REPLICAS = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")


def prepared(root: Path) -> Path:
    """Samples with one picture, several and none, of sizes between 10 x 90 and 90 x 10; one is too long and narrow."""
    draw, records = random.Random(3), []
    (root / "pictures").mkdir(parents=True)
    for i in range(120):
        shown = ""
        for j in range(draw.choice([0, 0, 0, 1, 1, 2])):
            size = (1, 400) if (i, j) == (60, 0) else (draw.randrange(10, 90), draw.randrange(10, 90))
            name = f"{i}-{j}.png"
            Image.effect_noise(size, 60).convert("RGB").save(root / "pictures" / name)
            shown += f"Picture {j + 1}: <img>{name}</img>\n"
        turns = [
            {"from": "user", "value": shown + f"What is shown in number {i}?"},
            {"from": "assistant", "value": f"A thing of the kind {i % 7}, and another of {i % 5}."},
        ]
        records.append({"id": f"r{i}", "conversations": turns})
    (root / "records.json").write_text(json.dumps(records))
    words = ["prepare", str(root / "records.json"), "--images", str(root / "pictures"), "--out", str(root / "data")]
    assert main(words) == 0
    return root / "data"


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_through_every_command(run_data: RunData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = prepared(tmp_path / "raw")
    own = (*NATIVE, f"data.train=[{{path: {data}, name: own}}]", f"data.validation=[{{path: {data}}}]")
    words = run_data.words(tmp_path / "run", *own)
    ranks.megavlm([*words, "training.train_steps=3"], world=1)
    shutil.copytree(tmp_path / "run", tmp_path / "wide")
    ranks.megavlm([*words, "training.train_steps=6"], world=1)
    ranks.megavlm([*run_data.words(tmp_path / "wide", *own, *WIDE), "training.train_steps=6"], world=4)
    compared = set()
    for alone, wide in zip(lines(tmp_path / "run"), lines(tmp_path / "wide"), strict=True):
        for key in {"loss", "validation_loss", "grad_norm"} & alone.keys():
            assert wide[key] == pytest.approx(alone[key], rel=1e-4)
            compared.add(key)
    assert compared == {"loss", "validation_loss", "grad_norm"}
    losses = [line["loss"] for line in lines(tmp_path / "run") if "loss" in line]
    assert losses[-1] < losses[0]
    # Packs without a picture on one replica, some with on the other: it ends, and ranks agree on every step.
    ranks.megavlm([*run_data.words(tmp_path / "replicas", *own, *REPLICAS), "training.train_steps=4"], world=2)
    assert [line["loss"] for line in lines(tmp_path / "replicas") if "loss" in line][-1] < losses[0]

    picture = tmp_path / "wide.png"
    Image.effect_noise((90, 30), 80).convert("RGB").save(picture)
    ask = ["generate", "--image", str(picture), "--prompt", "What is this?", "--max-new-tokens=6"]
    answers = [
        ranks.megavlm([*ask, str(tmp_path / "wide"), *more], world=world, apart=True).stdout
        for more, world in (((), None), (WIDE, 4))
    ]
    assert answers[0] == answers[1] and answers[0].strip()
    narrow = tmp_path / "narrow.png"
    Image.new("RGB", (1, 400)).save(narrow)
    done = ranks.megavlm(
        ["generate", str(tmp_path / "run"), "--image", str(narrow), "--prompt", "?", "--max-new-tokens=2"], check=False
    )
    assert done.code == 2 and "over 200 times" in done.stderr + done.stdout

    page = tmp_path / "page.html"
    recipe = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1] / "recipe.yaml"
    assert main(["inspect", "--recipe", str(recipe), "--out", str(page), "--samples", "2", "--packs", "1"]) == 0
    assert "patches" in page.read_text()
    capsys.readouterr()
    assert main(["plan", str(recipe), "--gpus", "1", "--picture-size", "90x30"]) == 0
    assert "GiB" in capsys.readouterr().out
