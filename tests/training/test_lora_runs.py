"""``megavlm train`` with adapters as its users run it: a base, adapters, resume, answers, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from launch import torchrun
from run_data import RunData

from megavlm.checkpoint.stream import CheckpointReader
from megavlm.cli import main

TP2_PP2 = (
    "parallel.tensor_model_parallel_size=2",
    "parallel.pipeline_model_parallel_size=2",
    "parallel.sequence_parallel=true",
)
ALONE = (
    "parallel.tensor_model_parallel_size=1",
    "parallel.pipeline_model_parallel_size=1",
    "parallel.sequence_parallel=false",
)
LORA = (
    "lora.rank=4", "lora.targets=[c_attn,c_proj,w1,w2]", "lora.dropout=0.1", "modules.vision.freeze=true",
    "training.train_steps=4", "checkpoint.save_interval=2", "checkpoint.keep=9",
)  # fmt: skip


def train(data: RunData, output: Path, *overrides: str, ranks: int = 1) -> str:
    return torchrun("megavlm", *data.words(output, *overrides), ranks=ranks, module=True)


def losses(output: Path) -> dict[int, float]:
    found: dict[int, float] = {}
    for line in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()):
        if "loss" in line:
            assert found.get(line["step"], line["loss"]) == line["loss"]  # a step that ran twice is the same
            found[line["step"]] = line["loss"]
    return found


@pytest.fixture(scope="module")
def base(run_data: RunData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("base")
    train(run_data, output, "training.train_steps=3")
    return output


@pytest.fixture(scope="module")
def adapted(run_data: RunData, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("adapted") / "run"
    train(run_data, output, *LORA, *TP2_PP2, f"checkpoint.load={base}", ranks=4)
    return output


def test_resume_is_exact(run_data: RunData, base: Path, adapted: Path, tmp_path: Path) -> None:
    """With dropout; and the base has been moved, which checkpoint.load says."""
    shutil.copytree(adapted, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    moved = base.rename(base.with_name("moved"))
    try:
        text = train(run_data, tmp_path / "run", *LORA, *TP2_PP2, f"checkpoint.load={moved}", ranks=4)
    finally:
        moved.rename(base)
    assert "at step 2" in text and sorted(losses(tmp_path / "run")) == [1, 2, 3, 4]


def test_a_checkpoint_holds_what_learns(base: Path, adapted: Path) -> None:
    step = adapted / "checkpoints" / "step-00000004"
    record = json.loads((step / "adapter.json").read_text())
    assert record["base"] == str(base / "checkpoints" / "step-00000003") and len(record["weights_sha256"]) == 64
    keys = {key for key in CheckpointReader(step).tensors() if not key.startswith("optimizer.")}
    learns = {key for key in keys if key.startswith("connector.") or key.endswith((".lora_a", ".lora_b"))}
    assert keys == learns and len([key for key in keys if ".lora_" in key]) == 8


def test_it_answers(run_data: RunData, adapted: Path, tmp_path: Path) -> None:
    words = ["eval", adapted, *ALONE, f"--data={run_data.heldout_json}", f"--images={run_data.images}"]
    torchrun("megavlm", *words, f"--out={tmp_path}/eval", "--limit=2", module=True)
    assert (tmp_path / "eval").is_dir()


REFUSED = {
    "another rank": (["lora.rank=8"], "lora.rank: 8, but"),
    "another target": (["lora.targets=[c_attn]"], "lora.targets: ['c_attn'], but"),
    "no adapters": (["lora.rank=null", "lora.targets=[]", "lora.dropout=0"], "lora.rank: null, but"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_adapters_are_refused(
    case: str, run_data: RunData, base: Path, adapted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = REFUSED[case]
    assert main(run_data.words(adapted, *LORA, f"checkpoint.load={base}", *words)) == 2
    assert message in capsys.readouterr().err


def test_adapters_of_weights_that_are_others_now(
    run_data: RunData, base: Path, adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = tmp_path / "checkpoints" / "step-00000004"
    shutil.copytree(adapted / "checkpoints" / "step-00000004", step)
    record = json.loads((step / "adapter.json").read_text())
    (step / "adapter.json").write_text(json.dumps({**record, "weights_sha256": "0" * 64}))
    assert main(["convert", "merge", "--megatron", str(step), "--out", str(tmp_path / "whole")]) == 2
    assert "are for the weights that" in capsys.readouterr().err
