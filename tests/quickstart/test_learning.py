"""A model of each kind learns from pictures: the quickstart's data, shrunk, and its colours asked of unseen pictures.

Shapes, parity and layouts are proven elsewhere; this is that a kind trains to something. Run once for a note, and when
the kind changes: ``make test-learning``. A picture shows one object of six colours, so that one in six is by chance.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ranks

from megavlm.cli import main
from megavlm.config.load import load_recipe
from megavlm.data.media import plan_of
from megavlm.data.tokenizer import train_sentencepiece
from megavlm.families.presets import expand_presets
from megavlm.quickstart.render import render_dataset
from megavlm.quickstart.render_scene import COLOURS

PICTURES, HELDOUT, STEPS = 1500, 360, 240
LEAST = 0.9
VOCABULARY = 640
TASKS = ("colour", "shape")
SMALL = {
    "num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 352, "num_attention_heads": 4, "num_query_groups": 4,
    "kv_channels": 32, "vocab_size": VOCABULARY, "max_position_embeddings": 2048, "init_method_std": 0.08,
}  # fmt: skip
"""As the language model of ``tiny``, on which the others are trained."""
PREFIX = {"attention_mask": "prefix", "vocab_size": VOCABULARY}
KINDS: dict[str, dict[str, Any]] = {
    # Phi: attention and MLP side by side behind one norm, half a head turned, biases everywhere.
    "side_by_side": {"language": {"preset": "phi", **SMALL}},
    # MobileVLM V2's: 64 patches become 16 tokens.
    "token_reducing": {"connector": {"preset": "ldpnetv2", "output_grid": 4, "init_method_std": 0.1}},
    # PaliGemma's: picture and question see each other both ways; in a template that trains on answers alone.
    "prefix": {"language": PREFIX, "template": "qwen2"},
    # InternVL's: four tiles of 32 pixels and the whole picture made small, each 16 patches and 4 tokens.
    "tiles": {
        "image": {"kind": "dynamic_tiles", "min_tiles": 1, "max_tiles": 4, "thumbnail": True},
        "vision": {"image_size": 32, "positional_grid": 4},
        "connector": {"preset": "pixel_shuffle", "factor": 2, "init_method_std": 0.1},
    },
}
TOKENS = {"side_by_side": 16, "token_reducing": 16, "prefix": 16, "tiles": 20}
"""Slots of a picture of 64 pixels."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's pictures with one object, and the questions about their colours and shapes."""
    root = tmp_path_factory.mktemp("learning")
    rendered = render_dataset(root / "raw", train_images=PICTURES, heldout_images=HELDOUT, seed=0)
    train = [one for one in map(asked, json.loads(rendered.train_json.read_text())) if one["conversations"]]
    heldout = [one for one in json.loads(rendered.heldout_json.read_text()) if one["task"] == "colour"]
    assert len(train) > PICTURES / 4
    assert len(heldout) >= 40 and len({one["answer"] for one in heldout}) == len(COLOURS)
    texts = [f"{turn['from']}\n{turn['value']}" for one in train for turn in one["conversations"]]
    train_sentencepiece(texts, root / "tokenizer.model", VOCABULARY)
    (root / "heldout.json").write_text(json.dumps(heldout))
    (root / "train.json").write_text(json.dumps(train))
    images = ["--images", str(rendered.images_dir)]
    assert main(["prepare", str(root / "train.json"), *images, "--out", str(root / "train")]) == 0
    return root


def asked(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with its turns about colours and shapes alone, the picture in front of the first."""
    turns, kept = record["conversations"], list[dict[str, Any]]()
    for number, task in enumerate(record["tasks"]):
        kept += turns[2 * number : 2 * number + 2] if task in TASKS else []
    if kept and kept[0] is not turns[0]:
        pictures, _, _ = turns[0]["value"].rpartition("\n")
        kept[0] = {**kept[0], "value": f"{pictures}\n{kept[0]['value']}"}
    return {**record, "conversations": kept}


@pytest.mark.learning
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_learns_colours(kind: str, data: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "eval"
    model = {"preset": "tiny", "language": {"vocab_size": VOCABULARY}, **KINDS[kind]}
    words = [
        f"output_dir={run}", f"model={json.dumps(model)}", f"data.train.0.path={data / 'train'}", "data.validation=[]",
        f"data.tokenizer={data / 'tokenizer.model'}", f"training.train_steps={STEPS}",
        "training.validation_interval=null", "logging.panel_interval=null", f"checkpoint.save_interval={STEPS}",
        "parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=1",
        "parallel.sequence_parallel=false",
    ]  # fmt: skip
    recipe = load_recipe("quickstart", words, expand_presets)
    assert plan_of(recipe.model).plan(64, 64).tokens == TOKENS[kind]
    ranks.megavlm(["train", "quickstart", *words], world=1, timeout=2400)
    records, images = str(data / "heldout.json"), str(data / "raw" / "images")
    assert main(["eval", str(run), "--data", records, "--images", images, "--out", str(out)]) == 0
    scores = json.loads((out / "scores.json").read_text())
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line["loss"] for line in losses if "loss" in line]
    print(f"{kind}: loss {found[0]:.3f} to {found[-1]:.3f}; colours {scores['accuracy']} of {scores['counts']}")
    assert scores["counts"]["colour"] >= 40
    assert scores["accuracy"]["colour"] >= LEAST
