"""``megavlm convert inspect``: what it says of either kind of checkpoint; and help that costs nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hf_makers
import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import save_file
from tiny import IMAGE_TOKEN, random_packs, tiny_recipe

from megavlm.checkpoint.slots import METADATA
from megavlm.cli import main
from megavlm.data.device_batch import make_batch
from megavlm.parallel.state import process_groups
from megavlm.training.build import build_training
from megavlm.training.step import train_step

ROOT = Path(__file__).resolve().parents[3]
ACTIONS = {"hf-to-megatron": "hf_to_megatron", "megatron-to-hf": "megatron_to_hf", "inspect": "inspect",
           "verify": "verify"}  # fmt: skip


def inspect(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    capsys.readouterr()
    assert main(["convert", "inspect", *map(str, words)]) == 0
    return capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], path: Path) -> dict[str, Any]:
    return json.loads(inspect(capsys, path, "--json"))


def test_hugging_face_weights(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = hf_makers.state()
    facts = as_json(capsys, source)
    assert facts["kind"] == "Hugging Face weights" and facts["family"].startswith("qwen_vl (")
    assert facts["parameters"] == sum(value.numel() for value in state.values())
    assert facts["tensors"] == {n: [list(v.shape), "float32", "model.safetensors"] for n, v in state.items()}
    text = inspect(capsys, source)
    assert "  transformer.h.0..1.attn.c_attn.weight" in text and "transformer.h.0.attn" not in text
    assert f"parameters: {facts['parameters']}\n" in text
    every = inspect(capsys, source, "--all")
    assert "transformer.h.0.attn.c_attn.weight" in every and "transformer.h.1.attn.c_attn.weight" in every
    assert as_json(capsys, source / "model.safetensors")["parameters"] == facts["parameters"]


def test_layers_that_differ_or_are_missing_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {f"h.{i}.w": torch.zeros(2) for i in (0, 1, 3)} | {"h.4.w": torch.zeros(3), "q": torch.ones(1).char()}
    save_file(tensors, tmp_path / "model.safetensors")
    text = inspect(capsys, tmp_path)
    assert "family: unknown" in text and "h.0..3.w" in text and "(3 of them)" in text and "  h.4.w" in text
    assert "I8" in text


def test_a_converted_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = as_json(capsys, checkpoint)
    assert facts["kind"] == "Megatron distributed checkpoint" and facts["optimizer state"] == "none"
    assert facts["step"] == 0 and facts["parts"] == ["connector", "language", "vision"]
    assert facts["family"] == "qwen_vl" and facts["parameters"] == sum(v.numel() for v in hf_makers.state().values())
    assert facts["tensors"]["language.decoder.layers.mlp.linear_fc2.weight"] == [[2, 128, 88], "float32", "2 chunks"]
    assert "language.embedding.word_embeddings.weight" in inspect(capsys, checkpoint)


def test_a_trained_checkpoint_with_optimizer_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, path = tiny_recipe(), tmp_path / "step-00000001"
    path.mkdir()
    with process_groups(recipe.parallel, 1):
        training = build_training(recipe, IMAGE_TOKEN)
        packs = [make_batch(p, torch.from_numpy(x), torch.device("cpu")) for p, x in random_packs(1)]
        training.scheduler.step(1)
        train_step(training.chunks, training.optimizer, packs, num_sources=1)
        state = {"model": training.modules[0].sharded_state_dict(metadata=dict(METADATA))}
        state["optimizer"] = training.optimizer.sharded_state_dict(state, metadata=dict(METADATA))
        dist_checkpointing.save(state, str(path), content_metadata=dict(METADATA))
        count = sum(p.numel() for p in training.modules[0].parameters())
    (path / "run.json").write_text('{"step": 1, "megavlm": "0"}')
    (tmp_path / "latest").write_text("step-00000001\n")
    for given in (path, tmp_path):  # the run's directory means its newest checkpoint
        facts = as_json(capsys, given)
        assert facts["path"] == str(path) and facts["step"] == 1 and "family" not in facts
        assert facts["parameters"] == count and facts["optimizer state"].endswith(" GiB")
        moments = [name for name in facts["tensors"] if name.startswith("optimizer.") and "exp_avg_sq" in name]
        assert moments and not any("_extra_state" in name for name in facts["tensors"])


def test_neither_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, message in ((tmp_path, "holds no weights"), (tmp_path / "absent", "no such file or directory")):
        assert main(["convert", "inspect", str(path)]) == 2
        error = capsys.readouterr().err
        assert message in error and str(path) in error and error.count("\n") == 1


WATCH = """\
import contextlib, io, json, sys
sys.argv = sys.argv[1:]
out = io.StringIO()
with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
    if sys.argv[0].endswith(".py"):
        import runpy
        sys.path.insert(0, sys.argv[0].rpartition("/")[0])
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        from megavlm.cli import main
        main(sys.argv)
loaded = [name for name in ("torch", "megatron", "numpy") if name in sys.modules]
print(json.dumps([out.getvalue(), loaded]))
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=600, env=env, check=False)


@pytest.mark.parametrize("action", ACTIONS)
def test_the_scripts_are_the_command_and_help_imports_nothing_large(action: str) -> None:
    script = str(ROOT / "tools" / "checkpoint_convert" / f"{ACTIONS[action]}.py")
    texts = []
    for words in ([script, "--help"], ["convert", action, "--help"]):
        done = run("-c", WATCH, *words)
        assert done.returncode == 0, done.stderr
        text, loaded = json.loads(done.stdout)
        assert loaded == [] and text.startswith(f"usage: megavlm convert {action}")
        texts.append(text)
    assert texts[0] == texts[1]


def test_a_script_fails_as_the_command_does(tmp_path: Path) -> None:
    """And inspect.py does not hide the standard library's module of that name."""
    directory = ROOT / "tools" / "checkpoint_convert"
    done = run(str(directory / "inspect.py"), str(tmp_path / "absent"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"megavlm: error: {tmp_path}/absent: no such file or directory\n"
    done = run(str(directory / "megatron_to_hf.py"), "--out", "x")
    assert done.returncode == 2 and done.stderr.startswith("megavlm: error: the following arguments are required")
