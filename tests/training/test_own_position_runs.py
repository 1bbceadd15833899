"""Positions of three numbers and a deepstack through the commands: train, go on, panel, answers, eval, plan."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest
import ranks
import torch
from PIL import Image
from run_data import RunData

from megavlm.cli import main
from megavlm.data.media import TokenGrid
from megavlm.data.schema import Turn
from megavlm.inference.checkpoint import add_model_arguments, model_of
from megavlm.inference.generate import pack_prompts
from megavlm.inference.prompt import Prompt
from megavlm.inference.sampling import Sampling
from megavlm.inference.session import Asked, session
from megavlm.inference.turns import user_turn
from megavlm.models.build import unwrap

pytestmark = pytest.mark.long

MODEL = (
    "model.connector={preset: mlp2x_gelu}",
    "model.vision.image_size=16",
    "model.vision.deepstack_layers=[0,1,0]",
    "model.language.rotary_sections=[2,3,3]",
    "training.validation_interval=2",
    "logging.panel_interval=2",
    "checkpoint.save_interval=2",
    "optimizer.schedule=constant",
)
LAYOUT = (
    "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2",
    "parallel.sequence_parallel=true",
)  # fmt: skip


def test_a_run_through_every_command(run_data: RunData, tmp_path: Path) -> None:
    words = run_data.words(tmp_path / "run", *MODEL)
    ranks.megavlm([*words, "training.train_steps=3"], world=1)
    shutil.copytree(tmp_path / "run", tmp_path / "wide")
    ranks.megavlm([*words, "training.train_steps=6"], world=1)
    wide = [*run_data.words(tmp_path / "wide", *MODEL, *LAYOUT), "training.train_steps=6"]
    ranks.megavlm(wide, world=4)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "wide")
    ]
    compared = 0
    for alone, cut in zip(*lines, strict=True):
        for key in {"loss", "validation_loss"} & alone.keys():
            assert cut[key] == pytest.approx(alone[key], rel=1e-4)
            compared += 1
    assert compared > 6
    # Other positions are another model: its losses are others, from the same weights and data.
    plain = [*run_data.words(tmp_path / "plain", *MODEL), "model.language.rotary_sections=[]"]
    ranks.megavlm([*plain, "training.train_steps=3", "training.validation_interval=null"], world=1)
    first = json.loads((tmp_path / "plain" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] != pytest.approx(lines[0][0]["loss"], rel=1e-6)
    picture = tmp_path / "picture.png"
    Image.effect_noise((40, 30), 80).convert("RGB").save(picture)
    ask = ["generate", "--image", str(picture), "--prompt", "What is this?", "--max-new-tokens=6"]
    answers = [
        ranks.megavlm([*ask, str(tmp_path / "wide"), *more], world=world, apart=True).stdout
        for more, world in (((), None), (LAYOUT, 4))
    ]
    assert answers[0] == answers[1] and answers[0].strip()
    continued(tmp_path / "run", picture.read_bytes())
    recipe = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1] / "recipe.yaml"
    assert main(["inspect", "--recipe", str(recipe), "--out", str(tmp_path / "page.html"), "--samples", "2"]) == 0
    assert main(["plan", str(recipe), "--gpus", "4"]) == 0
    score = ["eval", str(tmp_path / "run"), "--data", str(run_data.heldout_json), "--images", str(run_data.images)]
    ranks.megavlm([*score, "--limit=4", "--max-new-tokens=4", f"--out={tmp_path / 'eval'}"])


def continued(run: Path, picture: bytes) -> None:
    """A conversation that goes on, with a picture in each question: each has its own place."""
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    recipe, checkpoint, tokenizer = model_of(parser.parse_args([str(run)]))
    turns = (user_turn("What is this?", 1), Turn("assistant", "A square"), user_turn("And this one?", 1))
    asked = Asked(turns, (picture, picture))
    with session(recipe, checkpoint, tokenizer) as model:
        found = list(model.ask(asked, max_new_tokens=4, sampling=Sampling(report=0)))
        (chunk,) = model.chunks
        tokens = model.encoded(asked).tokens
        assert tokens is not None
        own = unwrap(chunk).own_positions
        assert own is not None
        prompt = Prompt(tokens, *model._decoded([asked.images])[0][0], (TokenGrid(1, 2, 2),) * 2)
        whole = prompt.positions(own, 0)
        # Two pictures of 2 x 2: each takes two positions instead of four.
        assert whole.shape[1] == len(tokens) and whole.max() == len(tokens) - 1 - 4
        chunk.eval()
        for piece in found:
            if piece.report is None:  # the end of the answer
                break
            with torch.no_grad():
                batch = pack_prompts([prompt], len(prompt), own)
                logits = chunk(**{**batch.inputs(), "images": prompt.images})[0, -1, : tokenizer.vocab_size].float()
            token = int(logits.argmax())
            assert piece.report.log_probability == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-4)
            prompt.answer.append(token)
        assert prompt.answer
