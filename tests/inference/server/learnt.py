"""A tiny checkpoint that has learnt one answer by heart: real weights, real generation, and boxes to draw."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw
from ranks import megavlm
from run_data import RECIPE, RunData

from megavlm.commands import prepare

QUESTION = "Where is the red disc?"
ANSWER = "The <ref>red disc</ref><box>(125,250),(500,625)</box> is there."
STEPS = 60


@dataclass(frozen=True)
class Learnt:
    """Where it lies."""

    checkpoint: Path
    picture: Path


def make_learnt(data: RunData, root: Path, steps: int = STEPS) -> Learnt:
    """Draw a picture and train on it."""
    images = root / "images"
    images.mkdir(parents=True)
    scene = Image.new("RGB", (320, 320), (235, 232, 224))
    draw = ImageDraw.Draw(scene)
    draw.ellipse((40, 80, 160, 200), fill=(204, 40, 40))
    draw.rectangle((200, 180, 280, 260), fill=(60, 90, 170))
    scene.save(images / "scene.png")
    turns = [{"from": "user", "value": f"Picture 1: <img>scene.png</img>\n{QUESTION}"}]
    turns.append({"from": "assistant", "value": ANSWER})
    records = [{"id": str(k), "conversations": turns} for k in range(64)]
    (root / "data.json").write_text(json.dumps(records))
    shutil.copy(data.root / "tokenizer.model", root)
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    for name in ("train", "heldout"):
        prepare.run(parser.parse_args([str(root / "data.json"), f"--images={images}", f"--out={root / name}"]))
    (root / "recipe.yaml").write_text(RECIPE.format(root=root))
    words = ["train", root / "recipe.yaml", f"output_dir={root / 'learnt'}", f"training.train_steps={steps}"]
    megavlm([*words, "logging.panel_samples=1"], world=1)
    return Learnt(root / "learnt", images / "scene.png")
