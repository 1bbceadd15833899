"""Checkpoints with optimizer state go from one Megatron-Core to another and back, bit for bit.

``OTHER_PYTHON`` names another interpreter that has megavlm's packages, with another Megatron-Core; ``make test-312``
sets it where `.venv` has Python 3.11.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import megatron.core
import pytest
import torch
from launch import ROOT

from megavlm.checkpoint.slots import Slot
from megavlm.checkpoint.stream import CheckpointReader

WORKER = ROOT / "tests" / "training" / "reshard_worker.py"
OTHER = os.environ.get("OTHER_PYTHON", "")
pytestmark = pytest.mark.skipif(
    not OTHER, reason="OTHER_PYTHON names no interpreter with another Megatron-Core (make test-312)"
)


def run(python: str, *words: object) -> str:
    """Run an interpreter in this repository; return what it says."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [python, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tensors(root: Path) -> dict[str, str]:
    """Return the digest of each tensor of the checkpoint there."""
    reader = CheckpointReader(root / "step-00000003")
    found = {}
    for key, entry in reader.tensors().items():
        whole = reader.read(Slot(key, tuple(entry.size)))
        found[key] = sha256(whole.flatten().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def other_version() -> str:
    """The other one's Megatron-Core; it has to be another."""
    say = "import importlib.metadata as m; print(m.version('megatron-core'))"
    version = run(OTHER, "-c", say).strip()
    assert version != megatron.core.__version__, f"both have {version}"
    return version


@pytest.mark.parametrize("first", ["here", "there"])
def test_a_checkpoint_goes_on_with_the_other(first: str, other_version: str, tmp_path: Path) -> None:
    pythons = [sys.executable, OTHER] if first == "here" else [OTHER, sys.executable]
    previous = None
    for i, python in enumerate(pythons):
        job = {"recipe": {}, "load": previous, "save": str(tmp_path / str(i))}
        (tmp_path / "job.json").write_text(json.dumps(job))
        run(python, WORKER, tmp_path / "job.json")
        previous = str(tmp_path / str(i) / "step-00000003")
    before, after = tensors(tmp_path / "0"), tensors(tmp_path / "1")
    assert before == after and any(key.startswith("optimizer.") for key in before), other_version
