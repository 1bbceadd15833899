"""A family that another package brings: its parts, template, image plan and tables, with no change in megavlm."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import ranks
import torch
import yaml
from outside_cases import answers, commands, counted
from run_data import RunData
from safetensors.torch import load_file, save_file

PACKAGE = Path(__file__).parent / "outside" / "quilt"
TEXT = {
    "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2,
    "kv_channels": 16, "vocab_size": 512, "max_position_embeddings": 512, "logits_scaling": 2.0,
}  # fmt: skip
CONFIG = {
    "model_type": "quilt",
    "vision": {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_layers": 2},
    "pool": 2,
    "text": TEXT,
}
SHORT = ("training.train_steps=2", "training.global_batch_size=2", "data.num_workers=0", "logging.log_interval=1",
         "data.packing_buffer_size=32", "data.shuffle_buffer_size=32", "optimizer.warmup_steps=0",
         "optimizer.lr=2e-3", "data.sequence_length=192")  # fmt: skip
TP2_PP2 = ("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2",
           "parallel.sequence_parallel=true")  # fmt: skip


def install(site: Path) -> None:
    """Put the package where an installer would, with its entry point."""
    shutil.copytree(PACKAGE, site / "quilt", ignore=shutil.ignore_patterns("__pycache__"))
    info = site / "quilt-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: quilt\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[megavlm.presets]\nquilt = quilt:register\n")


def published(directory: Path) -> Path:
    """Write a checkpoint of the family, by the names of its own code."""
    torch.manual_seed(3)
    shapes: dict[str, tuple[int, ...]] = {"eyes.places": (16, 48), "bridge.weight": (64, 48), "bridge.bias": (64,)}
    for n, size in enumerate((192, 48, 48)):
        shapes |= {f"eyes.step.{n}.weight": (48, size), f"eyes.step.{n}.bias": (48,)}
    for n in range(4):
        block = {"norm1.scale": (64,), "norm2.scale": (64,), "ffn.gain": (64,), "attn.q.weight": (64, 64)}
        block |= {f"attn.{x}.weight": (32, 64) for x in "kv"} | {"attn.o.weight": (64, 64)}
        block |= {"ffn.gate.weight": (96, 64), "ffn.up.weight": (96, 64), "ffn.down.weight": (64, 96)}
        shapes |= {f"blocks.{n}.{name}": shape for name, shape in block.items()}
    shapes |= {"words.weight": (512, 64), "norm.scale": (64,), "head.weight": (512, 64)}
    state = {name: torch.randn(shape) * 0.1 + (1.0 if len(shape) == 1 else 0.0) for name, shape in shapes.items()}
    directory.mkdir()
    save_file(state | {"eyes.counter": torch.tensor([7.0])}, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2))
    return directory


def lines_of(run: Path) -> list[dict[str, float]]:
    """Return what a run wrote of its steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def without_figures(recipe: str, words: tuple[str, ...], root: Path) -> None:
    """No plan, no order by cost, no MFU; training goes on, and no family takes the model."""
    uncounted = [*words, "model.vision.preset=uncounted", "checkpoint.load=null"]
    refused = ranks.megavlm(["plan", recipe, *uncounted, "--gpus", 1], check=False)
    assert refused.code == 2 and "uncounted" in refused.output and "no figures" in refused.output
    refused = ranks.megavlm(["train", recipe, *uncounted, "data.balance_images=true"], check=False)
    assert refused.code == 2 and "data.balance_images" in refused.output
    plain = ["train", recipe, f"output_dir={root / 'plain'}", *uncounted, "data.balance_images=false"]
    ranks.run(commands, plain, world=1, peak=1e12)
    assert [line["loss"] > 0 and "mfu" not in line for line in lines_of(root / "plain")] == [True, True]
    # That tower is of an architecture that no family has, and each says so.
    out = ["convert", "megatron-to-hf", "--megatron", root / "plain", "--out", root / "nowhere"]
    refused = ranks.megavlm(out, check=False)
    assert refused.code == 2 and "no Hugging Face family holds this model whole" in refused.output
    for family, known in (("quilt", "patchwork"), ("llava", "vit")):
        refused = ranks.megavlm([*out, "--family", family], check=False)
        reason = f"--family {family}: the vision preset 'uncounted' is of the architecture uncounted, not {known}"
        assert refused.code == 2 and reason in refused.output


def test_a_family_from_another_package(run_data: RunData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    site.mkdir()
    install(site)
    monkeypatch.syspath_prepend(str(site))
    hf, megatron = published(tmp_path / "hf"), tmp_path / "megatron"
    shutil.copy(run_data.root / "tokenizer.model", hf)
    there_and_back = (
        ["convert", "hf-to-megatron", "--hf", hf, "--out", megatron],
        ["convert", "megatron-to-hf", "--megatron", megatron, "--out", tmp_path / "back"],
    )
    ranks.run(commands, *there_and_back)
    model = yaml.safe_load((megatron / "recipe.yaml").read_text())["model"]
    assert model["template"] == "quilt" and model["image"]["kind"] == "top"
    assert (
        model["language"]["logits_scaling"] == 2.0
        and model["connector"].items() >= {"preset": "pool", "side": 2}.items()
    )
    before, after = load_file(hf / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert set(after) == set(before) - {"eyes.counter"}
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == CONFIG

    # Two steps at TP 2 x PP 2 are those of one process; the planner knows the layout, and MFU what was computed.
    recipe = str(megatron / "recipe.yaml")
    words = (
        f"data.train.0.path={run_data.root / 'train'}",
        f"data.tokenizer={run_data.root / 'tokenizer.model'}",
        *SHORT,
    )
    ranks.run(commands, ["train", recipe, f"output_dir={tmp_path / 'one'}", *words], world=1)
    split = ["train", recipe, f"output_dir={tmp_path / 'four'}", *words, *TP2_PP2]
    ranks.run(commands, split, world=4, peak=1e12)
    one, four = lines_of(tmp_path / "one"), lines_of(tmp_path / "four")
    assert len(one) == len(four) == 2
    for alone, together in zip(one, four, strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
        assert together["mfu"] > 0
    planned = ranks.megavlm(["plan", recipe, *words, *TP2_PP2, "--gpus", 4])
    assert "patchwork" in planned.output or "step" in planned.output, planned.output

    # What was trained goes back: other weights under the same names, and its template.
    out = ["convert", "megatron-to-hf", "--megatron", tmp_path / "four", "--out", tmp_path / "trained"]
    ranks.run(commands, out)
    trained = load_file(tmp_path / "trained" / "model.safetensors")
    assert set(trained) == set(after)
    for name in ("blocks.3.ffn.gain", "eyes.step.1.weight", "eyes.places", "bridge.bias"):
        assert not torch.equal(trained[name], before[name]), name
    assert "'Q: '" in (said := (tmp_path / "trained" / "chat_template.jinja").read_text()) or '"Q: "' in said

    # Where nothing says what the weights came as, it is the only family that can hold them.
    (megatron / "hf" / "conversion.json").unlink()
    ranks.run(commands, ["convert", "megatron-to-hf", "--megatron", megatron, "--out", tmp_path / "unnamed"])
    unnamed = load_file(tmp_path / "unnamed" / "model.safetensors")
    assert set(unnamed) == set(after) and all(torch.equal(value, before[name]) for name, value in unnamed.items())
    assert json.loads((tmp_path / "unnamed" / "config.json").read_text()).items() >= CONFIG.items()

    # It answers with a cache as with whole forward passes, though its decoder's keys are none of megavlm's decoder.
    (((text, picture), plain),) = ranks.run(answers, tmp_path / "one", *words)
    assert [text, picture] == plain and len(text) == len(picture) == 6 and text != picture
    asked = ["generate", tmp_path / "four", "--prompt", "What is this?", "--max-new-tokens=3", *words]
    ranks.run(commands, asked)

    # Its own figures are those that count.
    (found,) = ranks.run(counted, recipe, *words)
    planned_sizes, built, flops = found
    assert planned_sizes == built
    tower, connector = 2 * 48 * (192 + 2 * 48) * 16 * 3, 2 * 48 * 64 * 4 * 3
    attention, weights = 2 * 64 * 5000, 2 * 100 * (64 * (64 + 64) + 64 * 64 + 3 * 64 * 96)
    language = 4 * (attention + weights + 100 * 64) + 2 * 100 * 64 * 512
    assert flops == 3 * (tower + connector + language)

    # Adapters stand beside the layers that its table names.
    lora = [*words, "lora.rank=4", "modules.vision.freeze=true", f"output_dir={tmp_path / 'lora'}"]
    assert ranks.megavlm(["plan", recipe, *lora, "lora.targets=[attn.q,ffn.down]", "--gpus", 1]).code == 0
    refused = ranks.megavlm(["plan", recipe, *lora, "lora.targets=[q_proj]", "--gpus", 1], check=False)
    assert refused.code == 2 and "attn.q, attn.k, attn.v, attn.o, ffn.gate, ffn.up, ffn.down" in refused.output

    without_figures(recipe, words, tmp_path)


def test_without_the_package_its_checkpoint_is_of_no_known_family(tmp_path: Path) -> None:
    words = ["convert", "hf-to-megatron", "--hf", published(tmp_path / "hf"), "--out", tmp_path / "megatron"]
    done = ranks.megavlm(words, check=False)
    assert done.code == 2 and "'quilt' of its config.json belongs to no family" in done.output
