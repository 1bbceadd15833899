"""Peaks of devices, which MFU is measured against; what is told or hidden before Megatron-Core is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megavlm.config.errors import RecipeError
from megavlm.parallel import device
from megavlm.parallel.device import peak_flops_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("name", "bf16", "fp8"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 1979e12),
        ("NVIDIA H100 PCIe", 756e12, 1513e12),
        ("NVIDIA H100 NVL", 835e12, 1671e12),
        ("NVIDIA H200", 989e12, 1979e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, None),
        ("NVIDIA GB200", 2500e12, 5000e12),
        ("NVIDIA GeForce RTX 3090", 71e12, None),
        ("NVIDIA GeForce RTX 3090 Ti", 80e12, None),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 330.3e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),  # another chip
        ("NVIDIA RTX A6000", 154.8e12, None),
        ("Some GPU", None, None),
    ],
)
def test_the_longest_name_that_fits_gives_the_peak(name: str, bf16: float | None, fp8: float | None) -> None:
    assert peak_flops_of(name, "bf16") == bf16
    assert peak_flops_of(name, "fp8") == fp8
    assert peak_flops_of(name, "fp32") is None


def test_more_processes_than_gpus_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    device._check_local_rank()
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RecipeError, match=r"LOCAL_RANK: this is process 2 of its node, which has 2 GPU"):
        device._check_local_rank()


@pytest.mark.parametrize("body", ["import no_such_library", "raise OSError('libcudnn.so.9: cannot open')", None])
def test_a_broken_transformer_engine_is_hidden_and_a_whole_one_is_not(tmp_path: Path, body: str | None) -> None:
    package = tmp_path / "transformer_engine" / "pytorch"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text(body or "")
    code = (
        "from megavlm.parallel import device; device._hide_broken_transformer_engine();"
        "print(device.transformer_engine_installed())"
    )
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == str(body is None), done.stderr
    if body is not None:
        assert "installed but cannot be imported, so torch's layers run" in done.stderr
