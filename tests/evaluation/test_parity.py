"""``verify``: a converted checkpoint against a reference, at several layouts, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_cases import QWEN_VL, make, write_reference
from launch import ROOT
from ranks import script
from safetensors.torch import load_file, save_file

from megavlm.cli import main

SCRIPT = ROOT / "tools" / "checkpoint_convert" / "verify.py"
SHARED = ROOT.parent / "shared" / "reference" / "qwenvl-tiny"
TP, PP = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
LAYOUTS = {
    "tp2-sp": (2, (TP, "parallel.sequence_parallel=true")),
    "pp2-vpp2": (2, (PP, "parallel.virtual_pipeline_model_parallel_size=2")),
    "pp2-uneven": (2, (PP, "parallel.num_layers_in_first_pipeline_stage=1")),
    "tp2-pp2": (4, (TP, PP)),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Qwen-VL checkpoint, converted once, and its reference file."""
    root = tmp_path_factory.mktemp("parity")
    source = make("qwen_vl", root / "hf")
    assert main(["convert", "hf-to-megatron", "--hf", str(source), "--out", str(root / "m")]) == 0
    return root / "m", write_reference(source, QWEN_VL, root / "reference.safetensors")


def words(checkpoint: Path, reference: Path, *more: str) -> list[str]:
    return ["--megatron", str(checkpoint), "--reference", str(reference), *more]


def verify(checkpoint: Path, reference: Path, *more: str) -> int:
    return main(["convert", "verify", *words(checkpoint, reference, *more)])


def test_one_process(converted: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    assert verify(*converted) == 0
    assert "within the tolerance of 0.0002" in caplog.text and "s0: 60 tokens, 2 images" in caplog.text


@pytest.mark.dist
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_checkpoint_at_other_layouts(name: str, converted: tuple[Path, Path]) -> None:
    ranks, layout = LAYOUTS[name]
    text = script(SCRIPT, *words(*converted, "--set", *layout), world=ranks).output
    assert "within the tolerance" in text


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no reference checkpoint in {SHARED}")
def test_the_original_implementation(tmp_path: Path) -> None:
    assert main(["convert", "hf-to-megatron", "--hf", str(SHARED), "--out", str(tmp_path / "m")]) == 0
    assert verify(tmp_path / "m", SHARED / "reference.safetensors") == 0
    text = script(SCRIPT, *words(tmp_path / "m", SHARED / "reference.safetensors", "--set", TP, PP), world=4).output
    assert "within the tolerance of 0.0002" in text


@pytest.mark.parametrize("what", ["logits", "image_features", "loss"])
def test_a_difference_in_anything_fails(what: str, converted: tuple[Path, Path], tmp_path: Path) -> None:
    stored = load_file(converted[1])
    stored[f"s0.{what}"].view(-1)[-1] += 3e-4
    save_file(stored, tmp_path / "off.safetensors")
    assert verify(converted[0], tmp_path / "off.safetensors") == 1
    stored[f"s0.{what}"].view(-1)[-1] = float("nan")
    save_file(stored, tmp_path / "nan.safetensors")
    assert verify(converted[0], tmp_path / "nan.safetensors") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"s0.pixel_values": torch.zeros(2, 3, 14, 14)},
            "s0.pixel_values is [2, 3, 14, 14]; the model takes [N, 3, 28, 28]",
        ),
        ({"s0.pixel_values": torch.zeros(1, 3, 28, 28)}, "s0: 32 image slots, but its 1 images take 16"),
        ({"s0.logits": torch.zeros(1, 60, 121)}, "s0.logits are for 121 tokens, the model has 120"),
    ],
)
def test_references_of_other_models(
    change: dict[str, torch.Tensor], message: str, converted: tuple[Path, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    save_file({**load_file(converted[1]), **change}, tmp_path / "other.safetensors")
    assert verify(converted[0], tmp_path / "other.safetensors") == 2
    assert message in capsys.readouterr().err


def test_parts_of_a_model_are_not_run(
    converted: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make("qwen", tmp_path / "hf")
    assert main(["convert", "hf-to-megatron", "--hf", str(source), "--out", str(tmp_path / "m")]) == 0
    assert verify(tmp_path / "m", converted[1]) == 2
    assert "holds parts of a model only; compose" in capsys.readouterr().err
