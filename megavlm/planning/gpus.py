"""The GPUs that a plan may be made for: what their data sheets say, and the shares of it that a plan counts on.

All efficiencies of the planner are in this file. They are assumptions, from published runs of Megatron-type trainers
(40 to 55 % of the bf16 peak over a whole step): none was measured by megavlm on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from megavlm.config.errors import RecipeError
from megavlm.parallel.peaks import peak_flops_of

GIB = 2**30


@dataclass(frozen=True)
class Efficiency:
    """Shares of a GPU's peaks, between 0 and 1, that real work gets."""

    gemm: float
    """Matrix products of language model, connector and output layer, of the dense tensor-core peak."""
    fp8_gemm: float
    """The same in FP8, of the FP8 peak, with the casts and scales around them."""
    tower: float
    """Matrix products of the tower: narrow layers (1664), heads of 104."""
    attention: float
    """Fused attention, forward and backward, of the bf16 peak."""
    memory: float
    """Element-wise work (norms, residuals, activations, gradient sums, optimizer), of the memory bandwidth."""
    nvlink: float
    """Collectives in a node, of NVLink's rate in one direction."""
    network: float
    """Collectives and messages between nodes, of the network cards' rate."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU in nodes of eight."""

    name: str
    memory_bytes: float
    """Memory that a process sees, in bytes (less than the data sheet's, by what the driver keeps)."""
    bf16_flops: float
    """Dense bf16 FLOP/s (without sparsity)."""
    fp8_flops: float | None
    """Dense FP8 FLOP/s; None where the GPU has no FP8."""
    bandwidth: float
    """Memory bandwidth, bytes/s."""
    nvlink: float
    """NVLink, bytes/s in one direction."""
    network: float
    """Network card of one GPU, bytes/s in one direction."""
    source: str
    """Where the figures come from."""
    efficiency: Efficiency


_AMPERE = Efficiency(gemm=0.75, fp8_gemm=0.0, tower=0.65, attention=0.55, memory=0.80, nvlink=0.75, network=0.80)
# Hopper's GEMMs throttle on power before they reach the data sheet's peak.
_HOPPER = Efficiency(gemm=0.68, fp8_gemm=0.55, tower=0.58, attention=0.45, memory=0.80, nvlink=0.75, network=0.80)

_A100 = "NVIDIA A100 data sheet (SXM), NVLink 3, 600 GB/s both ways; DGX A100: one 200 Gb/s card per GPU"
_H100 = "NVIDIA H100 data sheet (SXM), NVLink 4, 900 GB/s both ways; DGX H100: one 400 Gb/s card per GPU"
_H200 = "NVIDIA H200 data sheet (SXM), NVLink 4, 900 GB/s both ways; DGX H200: one 400 Gb/s card per GPU"


def _peaks(name: str) -> tuple[float, float | None]:
    """Return the dense bf16 and FP8 peaks of a GPU."""
    bf16 = peak_flops_of(name, "bf16")
    assert bf16 is not None, name
    return bf16, peak_flops_of(name, "fp8")


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40g", 39.4 * GIB, *_peaks("NVIDIA A100"), 1555e9, 300e9, 25e9, _A100, _AMPERE),
        Gpu("a100-80g", 79.2 * GIB, *_peaks("NVIDIA A100"), 2039e9, 300e9, 25e9, _A100, _AMPERE),
        Gpu("h100-80g", 79.1 * GIB, *_peaks("NVIDIA H100"), 3350e9, 450e9, 50e9, _H100, _HOPPER),
        Gpu("h200-141g", 139.8 * GIB, *_peaks("NVIDIA H200"), 4800e9, 450e9, 50e9, _H200, _HOPPER),
    )
}
"""The GPUs by name."""

RESERVED_BYTES = 3.0 * GIB
"""What is not for tensors: CUDA context, cuBLAS and NCCL buffers of some five process groups."""
FRAGMENTATION = 0.04
"""Share of the tensors' bytes that PyTorch's allocator loses to gaps."""
HEADROOM = 0.06
"""Share of the memory that a plan leaves free, for its own error."""
COLLECTIVE_SECONDS = 15e-6
"""Latency of one collective or message, on top of its bytes."""
KERNEL_SECONDS = 6e-6
"""Least time of one kernel that Python launches."""


def find_gpu(name: str) -> Gpu:
    """Return the GPU called ``name``.

    Raises:
        RecipeError: there is none of that name.
    """
    if name not in GPUS:
        raise RecipeError(f"--gpu: no figures for {name!r}; take one of {', '.join(GPUS)}")
    return GPUS[name]
