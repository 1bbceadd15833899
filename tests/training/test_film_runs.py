"""Films through the commands: prepare, train, go on, other layouts, replicas, held-out questions, inspect."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import ranks
from film_maker import film
from PIL import Image
from run_data import RunData
from test_native_runs import NATIVE, REPLICAS, WIDE, lines

from megavlm.cli import main
from megavlm.config.schema import DataConfig, DataSource
from megavlm.data.films.plan import FilmShape
from megavlm.data.media import plan_of
from megavlm.data.reader import PackReader
from megavlm.data.tokenizer import load_tokenizer

pytestmark = pytest.mark.long

FILMS = (
    "model.video={kind: qwen2_vl, min_pixels: 64, max_pixels: 576, max_frames: 6, tokens_per_second: 2.0}",
    "checkpoint.save_interval=3",
)


def prepared(root: Path, what: str) -> Path:
    """Samples with films, pictures, both and neither; or with films in the first half and pictures in the other."""
    draw, records = random.Random(3), []
    (root / "media").mkdir(parents=True)
    for number, (frames, kind, codec) in enumerate(
        [(12, "mp4", "libx264"), (31, "mov", "mpeg4"), (1, "mp4", "libx264"), (20, "webm", "libvpx-vp9")]
    ):
        (root / "media" / f"{number}.film").write_bytes(film(frames, kind, codec, turn=90 * (number == 1)))
    (root / "media" / "broken.film").write_bytes(film(30)[:-700])
    for number in range(4):
        Image.effect_noise((30 + 9 * number, 50), 60).convert("RGB").save(root / "media" / f"{number}.png")
    for i in range(120):
        moves, still = (i < 60, i >= 60) if what == "halves" else (i % 3 == 0, i % 4 == 0)
        record = {"id": f"r{i}"}
        shown = ""
        if moves:
            record["video"] = "broken.film" if i == 57 else f"{draw.randrange(4)}.film"
            shown += "<video>\n"
        if still:
            record["image"] = f"{draw.randrange(4)}.png"
            shown += "<image>\n"
        turns = [
            {"from": "human", "value": shown + f"What is shown in number {i}?"},
            {"from": "gpt", "value": f"A thing of the kind {i % 7}, and another of {i % 5}."},
        ]
        records.append({**record, "conversations": turns})
    (root / "records.json").write_text(json.dumps(records))
    words = ["prepare", str(root / "records.json"), "--images", str(root / "media"), "--out", str(root / "data")]
    assert main(words) == 0
    (rejected,) = (root / "data" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected)["id"] == "r57" and "bad film" in rejected
    return root / "data"


def test_films_in_every_layout(run_data: RunData, tmp_path: Path) -> None:
    data = prepared(tmp_path / "raw", "mix")
    own = (*NATIVE, *FILMS, f"data.train=[{{path: {data}, name: own}}]", f"data.validation=[{{path: {data}}}]")
    words = run_data.words(tmp_path / "run", *own)
    ranks.megavlm([*words, "training.train_steps=3"], world=1)
    shutil.copytree(tmp_path / "run", tmp_path / "wide")
    ranks.megavlm([*words, "training.train_steps=6"], world=1)
    ranks.megavlm([*run_data.words(tmp_path / "wide", *own, *WIDE), "training.train_steps=6"], world=4)
    ranks.megavlm([*run_data.words(tmp_path / "whole", *own), "training.train_steps=6"], world=1)
    compared = set()
    for alone, wide, whole in zip(
        lines(tmp_path / "run"), lines(tmp_path / "wide"), lines(tmp_path / "whole"), strict=True
    ):
        for key in {"loss", "validation_loss", "grad_norm"} & alone.keys():
            assert wide[key] == pytest.approx(alone[key], rel=1e-4)
            assert whole[key] == alone[key]  # a run that was stopped and goes on has the same samples and numbers
            compared.add(key)
    assert compared == {"loss", "validation_loss", "grad_norm"}
    losses = [line["loss"] for line in lines(tmp_path / "run") if "loss" in line]
    assert losses[-1] < losses[0]

    page = tmp_path / "page.html"
    recipe = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1] / "recipe.yaml"
    assert main(["inspect", "--recipe", str(recipe), "--out", str(page), "--samples", "4", "--packs", "1"]) == 0
    html = page.read_text()
    assert "tokens a film" in html and 'alt="film 1 at 0.00 s"' in html and "Samples by number of films" in html


def test_films_on_one_replica_and_pictures_on_the_other(run_data: RunData, tmp_path: Path) -> None:
    data = prepared(tmp_path / "raw", "halves")
    own = (*NATIVE, *FILMS, f"data.train=[{{path: {data}, name: own}}]", "training.validation_interval=null",
           "data.shuffle_buffer_size=2", "data.packing_buffer_size=2")  # fmt: skip
    recipe = run_data.recipe(tmp_path / "replicas", *own)
    tokenizer = load_tokenizer(Path(recipe.data.tokenizer))
    sources = (DataSource(path=str(data)),)
    keys = {"sequence_length": 192, "num_workers": 0, "packing_buffer_size": 2, "shuffle_buffer_size": 2}
    kinds = []
    for rank in range(2):
        reader = PackReader(
            sources, DataConfig(train=sources, tokenizer="unused", **keys), tokenizer, plan_of(recipe.model), None,
            rank=rank, world_size=2, seed=recipe.training.seed, training=True,
        )  # fmt: skip
        shown = [shape for _ in range(4) for shape in next(reader).image_shapes]
        kinds.append({isinstance(shape, FilmShape) for shape in shown})
    assert kinds == [{True}, {False}]
    ranks.megavlm([*run_data.words(tmp_path / "replicas", *own, *REPLICAS), "training.train_steps=4"], world=2)
    losses = [line["loss"] for line in lines(tmp_path / "replicas") if "loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0]
