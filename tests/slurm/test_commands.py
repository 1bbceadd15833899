"""What the job scripts would run, and what they refuse, without a Slurm."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from launch import ROOT

SCRIPTS = ROOT / "examples" / "slurm"


def script(name: str, *words: str, **variables: str) -> tuple[int, list[str], str]:
    """Run a job script outside of a job; return its exit code, the command that it printed, and its errors."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    done = subprocess.run(
        ["bash", str(SCRIPTS / name), *words], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
        env={**kept, "DRY_RUN": "1", "PYTHON": sys.executable, "MEGAVLM_HOME": str(ROOT), **variables},
    )  # fmt: skip
    return done.returncode, shlex.split(done.stdout), done.stderr


def test_overrides_come_from_variable_and_arguments(tmp_path: Path) -> None:
    code, words, _ = script(
        "finetune_14b.sh", "data.system_message=two words", LOAD="/ckpt/a", OUTPUT_DIR=str(tmp_path / "run"),
        OVERRIDES=" optimizer.lr=1e-5\n training.seed=2 ",
    )  # fmt: skip
    train = words[words.index("train") :]
    assert code == 0 and words[0] == "srun"
    assert train == [
        "train", "codefuse_vl_14b/sft", f"output_dir={tmp_path}/run", "checkpoint.load=/ckpt/a", "optimizer.lr=1e-5",
        "training.seed=2", "data.system_message=two words",
    ]  # fmt: skip
    assert f"--output={tmp_path}/run/logs/job-none/rank-%4t.log" in words


@pytest.mark.parametrize(
    ("container", "expected"),
    [
        ("pyxis", ["--container-image=/images/megavlm", f"--container-mounts={ROOT}:{ROOT},/data:/data"]),
        ("apptainer", ["apptainer", "exec", "--nv", f"{ROOT}:{ROOT},/data:/data", "/images/megavlm"]),
    ],
)
def test_containers_stand_between_srun_and_the_ranks(container: str, expected: list[str]) -> None:
    variables = {"CONTAINER": container, "IMAGE": "/images/megavlm", "MOUNTS": "/data:/data", "PYTHON": ""}
    code, words, _ = script("pretrain_14b.sh", **variables)
    before = words[: words.index("bash")]
    assert code == 0 and [word for word in before if word in expected] == expected
    assert words[words.index("-m") - 1] == "python3"


def test_conversion_both_ways() -> None:
    code, words, _ = script("convert.sh", "--no-verify", HF="/models/a b", OUT="/ckpt/a")
    assert code == 0 and words[words.index("convert") :] == [
        "convert", "hf-to-megatron", "--hf", "/models/a b", "--out", "/ckpt/a", "--no-verify",
    ]  # fmt: skip
    code, words, _ = script("convert.sh", DIRECTION="out", MEGATRON="runs/a", OUT="/models/mine")
    assert code == 0 and words[words.index("convert") :] == [
        "convert", "megatron-to-hf", "--megatron", "runs/a", "--out", "/models/mine",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "variables", "message"),
    [
        ("pretrain_14b.sh", {"PYTHON": "/nowhere/python"}, "PYTHON: /nowhere/python is not there"),
        ("pretrain_14b.sh", {"MEGAVLM_HOME": "/nowhere"}, "MEGAVLM_HOME: /nowhere is not the repository"),
        ("pretrain_14b.sh", {"CONTAINER": "docker"}, "CONTAINER: docker is none of"),
        ("finetune_14b.sh", {"CONTAINER": "pyxis"}, "IMAGE: set it"),
        ("finetune_14b.sh", {"DRY_RUN": "0"}, "submit it with sbatch"),
        ("convert.sh", {}, "OUT: set it"),
        ("convert.sh", {"OUT": "/a", "DIRECTION": "out"}, "MEGATRON: set it"),
        ("convert.sh", {"OUT": "/a", "DIRECTION": "up"}, "DIRECTION: up is none of"),
    ],
)
def test_refusals_are_one_line(name: str, variables: dict[str, str], message: str) -> None:
    code, words, errors = script(name, **variables)
    assert code == 2 and not words and len(errors.splitlines()) == 1
    assert errors.startswith("error: ") and message in errors
