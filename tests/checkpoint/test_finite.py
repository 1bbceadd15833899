"""NaN and infinity end a conversion with the tensor's name, whichever way it goes; so does a type without room."""

from __future__ import annotations

import json
from pathlib import Path

import hf_makers
import pytest
import torch
from hf_makers import load_state
from safetensors.torch import save_file

from megavlm.checkpoint.finite import is_finite, narrowed, vanished
from megavlm.checkpoint.stream import CheckpointReader
from megavlm.cli import main

NORM = "transformer.ln_f.weight"


def convert(*words: object) -> int:
    return main(["convert", *map(str, words)])


def spoiled(directory: Path, name: str, value: float) -> Path:
    state = load_state(directory)
    state[name].view(-1)[-1] = value
    save_file(state, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [NORM, "transformer.h.1.attn.c_attn.weight", "transformer.visual.proj"])
def test_weights_that_are_no_numbers_do_not_come_in(
    name: str, value: float, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoiled(source, name, value)
    assert convert("hf-to-megatron", "--hf", source, "--out", tmp_path / "m") == 2
    what = "1 NaN" if value != value else "1 infinite values"
    assert f"{source}: {name}: holds {what} among" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_nor_do_they_go_out(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that went wrong is not exported as if nothing were."""
    read = CheckpointReader.read
    monkeypatch.setattr(CheckpointReader, "read", lambda self, slot: read(self, slot) * float("nan"))
    assert convert("megatron-to-hf", "--megatron", checkpoint, "--out", tmp_path / "home") == 2
    assert f"{checkpoint}: transformer.visual." in (error := capsys.readouterr().err) and "NaN among" in error
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("largest", "dtype", "says"),
    [
        (99840.0, "fp16", "99840 would be infinite in float16, which ends at 65504; take bf16 or fp32"),
        (-70000.0, "fp16", "70000 would be infinite in float16"),
        (3.4e38, "bf16", "3.4e+38 would be infinite in bfloat16, which ends at 3.38953e+38"),
        (65504.0, "fp16", ""),
        (65519.0, "fp16", ""),  # rounds down
        (3.3e38, "bf16", ""),
    ],
)
def test_a_type_without_room(
    largest: float, dtype: str, says: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf_makers.megatron(spoiled(source, NORM, largest), tmp_path / "m")
    code = convert("megatron-to-hf", "--megatron", tmp_path / "m", "--dtype", dtype, "--out", tmp_path / "home")
    error = capsys.readouterr().err
    assert (code, (tmp_path / "home").exists()) == ((2, False) if says else (0, True))
    assert not says or f"--dtype: {NORM}: its largest value {says}" in error
    if not says:
        assert all(is_finite(value) for value in load_state(tmp_path / "home").values())
        key = "torch_dtype"
        assert json.loads((tmp_path / "home" / "config.json").read_text())[key] == f"{'b' * (dtype == 'bf16')}float16"


def test_what_becomes_zero_is_counted(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hf_makers.megatron(spoiled(source, NORM, 1e-9), tmp_path / "m")
    caplog.set_level("INFO")
    assert convert("megatron-to-hf", "--megatron", tmp_path / "m", "--dtype", "fp16", "--out", tmp_path / "h") == 0
    assert "values became 0" in caplog.text
    small = torch.tensor([1e-9, 0.0, 1.0, -1e-10])
    assert vanished(small, narrowed(small, torch.float16, "")) == 2 and vanished(small, small) == 0


def test_every_type() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert is_finite(torch.zeros(0, 3, dtype=dtype)) and is_finite(torch.randn(5, 7).to(dtype))
        assert not is_finite(torch.tensor([[1.0, float("nan")], [0, 0]], dtype=dtype))
    with pytest.raises(ValueError, match="infinite in float32"):
        narrowed(torch.tensor([1e300], dtype=torch.float64), torch.float32, "x")
