"""The whole way: published weights in, trained at a parallel layout, and a Hugging Face directory home."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import qwen_reference
import torch
from family_cases import QWEN_VL, load, qwen_vl, write_reference
from qwen_reference import Sizes
from ranks import megavlm
from run_data import RunData

from megavlm.checkpoint.hf.template import render
from megavlm.cli import main
from megavlm.data.chat import encode_prompt
from megavlm.data.schema import Turn
from megavlm.data.tokenizer import load_tokenizer

TP, PP = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
LAYOUTS = {
    "tp2-pp2-sp": (4, (TP, PP, "parallel.sequence_parallel=true")),
    "pp2-uneven-vpp": (
        2,
        (PP, "parallel.num_layers_in_first_pipeline_stage=2", "parallel.virtual_pipeline_model_parallel_size=2"),
    ),
    "dp2": (2, ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")),
}


@pytest.mark.dist
@pytest.mark.parametrize("name", LAYOUTS)
def test_in_train_and_home(name: str, run_data: RunData, tmp_path: Path) -> None:
    ranks, layout = LAYOUTS[name]
    tokenizer = load_tokenizer(run_data.root / "tokenizer.model")
    sizes = dataclasses.replace(QWEN_VL, vocab=460, image_token=tokenizer.imgpad_id)
    source = qwen_vl(tmp_path / "hf", s=sizes)
    config = json.loads((source / "config.json").read_text())
    # Quickstart's tokenizer has its special tokens in another order than Qwen's.
    config["visual"]["image_start_id"] = tokenizer.ids["<img>"]
    (source / "config.json").write_text(json.dumps(config))
    shutil.copy(run_data.root / "tokenizer.model", source / "tokenizer.model")
    start, run, home = tmp_path / "start", tmp_path / "run", tmp_path / "home"
    assert main(["convert", "hf-to-megatron", "--hf", str(source), "--out", str(start)]) == 0

    # The recipe that the converter wrote: it names the checkpoint, which has the tokenizer.
    words = [str(start / "recipe.yaml"), f"data.train.0.path={run_data.root / 'train'}", f"output_dir={run}"]
    small = ["data.sequence_length=192", "data.num_workers=0", "training.train_steps=4", "training.global_batch_size=2"]
    small += ["optimizer.lr=1e-3", "optimizer.warmup_steps=1", "checkpoint.save_interval=2", "checkpoint.keep=1"]
    text = megavlm(["train", *words, *small, *layout], world=ranks).output
    assert f"loaded {start}" in text and "saved" in text
    shutil.rmtree(start)  # a trained checkpoint stands for itself

    assert main(["convert", "megatron-to-hf", "--megatron", str(run), "--out", str(home)]) == 0
    for file in ("config.json", "tokenizer.model", "modeling_qwen.py"):
        assert (home / file).read_bytes() == (source / file).read_bytes()
    template = (home / "chat_template.jinja").read_text()
    said = render(template, [{"role": "user", "content": "Hi?"}])
    trained = encode_prompt([Turn("user", "Hi?")], tokenizer, [], "You are a helpful assistant.")
    assert tokenizer.encode(said) == trained.tolist()
    stops = json.loads((home / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [tokenizer.ids["<|im_end|>"], tokenizer.eos_id]
    before, after = load(source), load(home)
    buffers = {"transformer.h.0.attn.masked_bias", "transformer.rotary_emb.inv_freq"}
    assert after.keys() == before.keys() - buffers
    assert {n: v.shape for n, v in after.items()} == {n: before[n].shape for n in after}
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    assert set(after) - moved <= {"transformer.visual.attn_pool.pos_embed"}

    # What went home, run by a plain implementation, is what the checkpoint computes in one process.
    reference = write_reference(home, sizes, tmp_path / "reference.safetensors")
    one = [TP, PP, "parallel.sequence_parallel=false", "parallel.virtual_pipeline_model_parallel_size=null"]
    one += ["parallel.num_layers_in_first_pipeline_stage=null", "parallel.overlap_param_gather=false"]
    single = [word.replace("=2", "=1") for word in one]
    assert main(["convert", "verify", "--megatron", str(run), "--reference", str(reference), "--set", *single]) == 0


def test_a_run_from_scratch_goes_home_as_well(run_data: RunData, tmp_path: Path) -> None:
    """Nothing came from Hugging Face: config.json is written from the recipe, the tokenizer is the run's."""
    model = [
        "language.hidden_size=256",
        "language.kv_channels=64",
        "connector.head_dim=128",
        "vision.positional_grid=16",
    ]
    words = run_data.words(tmp_path / "run", *(f"model.{key}" for key in model), "training.train_steps=3")
    megavlm(words, world=1)
    home, again = tmp_path / "home", tmp_path / "again"
    assert main(["convert", "megatron-to-hf", "--megatron", str(tmp_path / "run"), "--out", str(home)]) == 0
    tokenizer = load_tokenizer(home / "tokenizer.model")
    config = json.loads((home / "config.json").read_text())
    assert config["visual"]["image_start_id"] == tokenizer.ids["<img>"] and config["intermediate_size"] == 192
    sizes = Sizes(
        vocab=512, hidden=256, layers=4, heads=4, ffn=96, image=32, patch=8, width=48, vision_layers=2, vision_heads=4,
        vision_ffn=96, queries=4, rows=256, image_token=tokenizer.imgpad_id,
    )  # fmt: skip
    assert {name: tuple(value.shape) for name, value in load(home).items()} == qwen_reference.shapes(sizes)
    assert main(["convert", "hf-to-megatron", "--hf", str(home), "--out", str(again)]) == 0
    reference = write_reference(home, sizes, tmp_path / "reference.safetensors")
    for checkpoint in (tmp_path / "run", again):
        assert main(["convert", "verify", "--megatron", str(checkpoint), "--reference", str(reference)]) == 0
