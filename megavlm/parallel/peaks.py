"""What GPUs can do at most, from NVIDIA's data sheets; imports nothing, as the planner runs without torch."""

from __future__ import annotations

# Dense peak of the tensor cores in bf16, FLOP/s, from NVIDIA's data sheets (without sparsity). GeForce cards: with sums
# in fp32, as torch makes them, which is half of what they do with sums in fp16 (NVIDIA's papers on GA102, Ada and
# RTX Blackwell, appendices).
_PEAK_BF16_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 3090 Ti": 80e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 4090 D": 147.1e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
    "NVIDIA RTX A6000": 154.8e12,
}

# The same in FP8. GPUs before Ada and Hopper have none.
_PEAK_FP8_FLOPS = {
    "NVIDIA L40S": 733e12,
    "NVIDIA H100 PCIe": 1513e12,
    "NVIDIA H100 NVL": 1671e12,
    "NVIDIA H100": 1979e12,
    "NVIDIA H200": 1979e12,
    "NVIDIA B200": 4500e12,
    "NVIDIA GB200": 5000e12,
    "NVIDIA GeForce RTX 4090": 330.3e12,
    "NVIDIA GeForce RTX 4090 D": 294.2e12,
    "NVIDIA GeForce RTX 5090": 419e12,
}


def peak_flops_of(name: str, precision: str) -> float | None:
    """Return the peak FLOP/s of the device that torch calls ``name``, or None where it is not known."""
    table = {"bf16": _PEAK_BF16_FLOPS, "fp8": _PEAK_FP8_FLOPS}.get(precision, {})
    # Names of boards go on ("NVIDIA H100 80GB HBM3"); longer names of RTX cards are other cards ("... Laptop GPU").
    matches = [known for known in table if name == known or (" RTX " not in known and name.startswith(known))]
    return table[max(matches, key=len)] if matches else None
