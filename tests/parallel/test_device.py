"""Peaks of devices, which MFU is measured against."""

from __future__ import annotations

import pytest

from megavlm.parallel.device import peak_flops_of


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
