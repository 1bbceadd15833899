"""MM1's shape, small: a CLIP tower, a C-Abstractor and a Llama learn the same at two layouts, then in five views."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import ranks
from run_data import RunData
from trained_only import PARTS

pytestmark = [pytest.mark.long, pytest.mark.family("mm1", parts=PARTS["mm1"])]

PARTS_OF_IT = (
    "model.vision={preset: clip_vit, image_size: 32, patch_size: 8, hidden_size: 32, num_layers: 2, "
    "num_attention_heads: 4, ffn_hidden_size: 64, positional_grid: 4, activation: gelu}",
    "model.connector={preset: c_abstractor, output_grid: 2, hidden_size: 16, num_blocks: 1, position_embedding: false}",
    "modules.vision.freeze=false", "modules.connector.freeze=false", "modules.language.freeze=false",
    "optimizer.schedule=constant", "data.sequence_length=96",
)  # fmt: skip
LAYOUT = (
    "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2",
    "parallel.sequence_parallel=true",
)  # fmt: skip
VIEWS = ("model.vision.image_size=64", "model.image={kind: dynamic_tiles, min_tiles: 4, max_tiles: 4}")


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_steps_at_two_layouts_then_in_five_views(run_data: RunData, tmp_path: Path) -> None:
    words = run_data.words(tmp_path / "one", *PARTS_OF_IT, "checkpoint.save_interval=3")
    ranks.megavlm([*words, "training.train_steps=3"], world=1)
    shutil.copytree(tmp_path / "one", tmp_path / "four")  # weights begin otherwise at another layout
    ranks.megavlm([*words, "training.train_steps=6"], world=1)
    wide = run_data.words(tmp_path / "four", *PARTS_OF_IT, *LAYOUT, "checkpoint.save_interval=3")
    ranks.megavlm([*wide, "training.train_steps=6"], world=4)
    assert len(losses(tmp_path / "one")) == 6 and losses(tmp_path / "one")[0] > losses(tmp_path / "one")[5]
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    # The next stage interpolates the table of positions, and sees four tiles and the whole.
    checkpoint = sorted((tmp_path / "four" / "checkpoints").glob("step-*"))[-1]
    more = (*PARTS_OF_IT, *VIEWS, "training.train_steps=3", f"checkpoint.load={checkpoint}")
    ranks.megavlm(run_data.words(tmp_path / "views", *more), world=1)
    lines = [json.loads(line) for line in (tmp_path / "views" / "metrics.jsonl").read_text().splitlines()]
    seen = [line for line in lines if "views_per_second" in line]
    assert seen and all(line["views_per_second"] > 4.9 * line["images_per_second"] for line in seen)
    assert losses(tmp_path / "views")[2] < losses(tmp_path / "views")[0]
