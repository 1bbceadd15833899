"""``megavlm quickstart``: the wiring at a size that teaches nothing, and (marked ``full``) what the README promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from launch import ROOT
from ranks import megavlm

from megavlm.cli import main
from megavlm.commands.quickstart import layout_for
from megavlm.config.checks import check_recipe
from megavlm.config.load import load_recipe
from megavlm.families.presets import expand_presets
from megavlm.parallel.lock import held

KEYS = {
    "loss_first",
    "loss_last",
    "heldout_accuracy",
    "chance_accuracy",
    "box_iou50",
    "useful_tokens_per_second",
    "padding_fraction",
    "seconds_total",
    "seconds_training",
    "layout",
}


def quickstart(out: Path, *words: str, timeout: float) -> tuple[int, str]:
    """Run the command; return exit code and output."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "megavlm", "quickstart", f"--out={out}", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, env=env, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.mark.long
def test_wiring(tmp_path: Path) -> None:
    out = tmp_path / "quickstart"
    steps = ["training.train_steps=2", "optimizer.warmup_steps=1", "training.validation_interval=null"]
    code, text = quickstart(out, "--train-images=80", "--heldout-images=16", *steps, timeout=600)
    assert code == 0, text[-4000:]
    result = json.loads((out / "result.json").read_text())
    assert set(result) >= KEYS
    assert result["layout"] == "TP 2 x PP 2 x DP 1 + SP"
    assert 0 <= result["heldout_accuracy"] <= 1
    assert result["seconds_total"] > result["seconds_training"] > 0
    assert (out / "heldout.png").stat().st_size > 10_000
    assert "held-out accuracy" in text and str(out / "result.json") in text


def refused(out: Path, *words: str) -> str:
    """Return what it says."""
    done = megavlm(["quickstart", f"--out={out}", *words], check=False)
    assert done.code == 2 and done.stdout == ""
    return done.stderr


def test_refusals_come_before_any_work(tmp_path: Path) -> None:
    assert "optimizer.lrr" in refused(tmp_path / "out", "optimizer.lrr=1")
    text = refused(tmp_path / "out", "model.language.num_attention_heads=3")
    assert "model.language.num_attention_heads" in text
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert "is no quickstart's" in refused(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("held_part", ["", "train", "eval"])
def test_what_others_work_on_is_not_emptied(tmp_path: Path, held_part: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Another quickstart, or somebody who trains on by hand what the last one left."""
    out = tmp_path / "out"
    for name in ("data", "train", "eval"):
        (out / name).mkdir(parents=True)
        (out / name / "theirs").write_text("theirs")
    with held(out / held_part / "lock.json", "train", "theirs"):
        assert main(["quickstart", f"--out={out}"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"megavlm: error: --out {out}") and "is held by megavlm train (on host" in line
    assert (out / "data" / "theirs").is_file()
    assert not held_part or (out / held_part / "theirs").is_file()


STAND_IN = """
import sys, time
print("child", flush=True)
time.sleep(3000)
"""


def test_torchrun_ends_with_a_quickstart_that_is_killed(tmp_path: Path) -> None:
    """Of the ranks of a killed one nobody would take notice."""
    package = tmp_path / "torch" / "distributed"  # found before the real one: a torchrun that only waits
    package.mkdir(parents=True)
    for path in (package.parent / "__init__.py", package / "__init__.py"):
        path.touch()
    (package / "run.py").write_text(STAND_IN)
    code = "import os; from megavlm.commands.quickstart import _torchrun as t"
    code += "; os.environ['PYTHONPATH'] = os.environ['FAKE']"
    code += "; t(1, [])"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "FAKE": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None and process.stdout.readline() == "child\n"
    (child,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs([child], timeout=300)
    for one in alive:
        one.kill()
    assert not alive


@pytest.mark.full
def test_the_readme_is_true(tmp_path: Path) -> None:
    code, text = quickstart(tmp_path / "out", timeout=2400)
    assert code == 0, text[-4000:]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    print(text[text.rindex("---\nlayout") :] if "---\nlayout" in text else text[-2000:])
    accuracy = result["accuracy"]
    assert (accuracy["colour"] + accuracy["shape"]) / 2 >= 0.9  # over both: as many questions of each
    assert min(accuracy["colour"], accuracy["shape"]) >= 0.8
    assert result["counts"]["colour"] == result["counts"]["shape"] == 40
    assert result["heldout_accuracy"] > 2 * result["chance_accuracy"]
    assert result["padding_fraction"] <= 0.01
    assert result["loss_last"] < 0.2 * result["loss_first"]


@pytest.mark.parametrize(
    ("gpus", "ranks", "layout"),
    [(0, 4, (2, 2)), (1, 1, (1, 1)), (2, 2, (2, 1)), (3, 2, (2, 1)), (4, 4, (2, 2)), (8, 4, (2, 2))],
)
def test_fewer_than_four_gpus_take_a_smaller_layout(gpus, ranks, layout):
    processes, overrides = layout_for(gpus)
    recipe = load_recipe(
        "quickstart", ["output_dir=x", "data.train.0.path=x", "data.tokenizer=x", *overrides], expand_presets
    )
    check_recipe(recipe, processes)
    parallel = recipe.parallel
    assert processes == ranks
    assert (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size) == layout
