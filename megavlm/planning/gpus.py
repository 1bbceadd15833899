"""The GPUs that a plan may be made for: what their data sheets say, and the shares of it that a plan counts on.

All efficiencies of the planner are in this file. Hopper's FP8 products and attention are fitted on half of the
published runs in benchmarks/planner_published.py, and reported on the other half (docs/planning.md); its tower's
products are what one H200 was measured to do (benchmarks/gpu-torch.json). The others are assumptions that these runs
do not contradict.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from megavlm.config.errors import RecipeError
from megavlm.parallel.peaks import peak_flops_of
from megavlm.planning.measured import Rates

GIB = 2**30


@dataclass(frozen=True)
class Efficiency:
    """Shares of a GPU's peaks, between 0 and 1, that real work gets."""

    gemm: float
    """Matrix products of language model, connector and output layer, of the dense tensor-core peak."""
    fp8_gemm: float
    """The same in FP8, of the FP8 peak; the casts around them are counted by their bytes."""
    tower: float
    """Matrix products of the tower: narrow layers (1664), heads of 104."""
    attention: float
    """Fused attention of long samples, forward and backward, of the bf16 peak."""
    memory: float
    """Element-wise work (norms, residuals, activations, gradient sums, optimizer), of the memory bandwidth."""
    nvlink: float
    """Collectives in a node, of NVLink's rate in one direction."""
    network: float
    """Collectives and messages between nodes, of the network cards' rate."""
    expert_layer: float = 1.5e-3
    """Not a share: seconds of a layer with experts, forward, beside its work; backward it is twice that. The host waits
    to learn how many tokens go where, and then starts a product for each expert, while the GPU has nothing to do."""


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
    """NVLink, or PCI Express where there is none, bytes/s in one direction."""
    network: float
    """Network card of one GPU, bytes/s in one direction."""
    source: str
    """Where the figures come from."""
    efficiency: Efficiency
    device: str = ""
    """How torch calls it."""
    rates: Rates | None = None
    """What was measured, in place of efficiencies."""


_AMPERE = Efficiency(gemm=0.75, fp8_gemm=0.0, tower=0.65, attention=0.55, memory=0.80, nvlink=0.75, network=0.80)
# Hopper's GEMMs throttle on power before they reach the data sheet's peak.
_HOPPER = Efficiency(gemm=0.68, fp8_gemm=0.58, tower=0.64, attention=0.51, memory=0.80, nvlink=0.75, network=0.80)

_A100 = "NVIDIA A100 data sheet (SXM), NVLink 3, 600 GB/s both ways; DGX A100: one 200 Gb/s card per GPU"
_H100 = "NVIDIA H100 data sheet (SXM), NVLink 4, 900 GB/s both ways; DGX H100: one 400 Gb/s card per GPU"
_H200 = "NVIDIA H200 data sheet (SXM), NVLink 4, 900 GB/s both ways; DGX H200: one 400 Gb/s card per GPU"


_BLACKWELL = Efficiency(gemm=0.68, fp8_gemm=0.55, tower=0.58, attention=0.40, memory=0.80, nvlink=0.75, network=0.80)
# One card's links: collectives over PCI Express; GeForce cards pass them through the host's memory.
_WORKSTATION = dataclasses.replace(_AMPERE, fp8_gemm=0.60, nvlink=0.60)
_GEFORCE = dataclasses.replace(_AMPERE, gemm=0.80, fp8_gemm=0.65, memory=0.85, nvlink=0.40)

_B200 = "NVIDIA DGX B200 data sheet (1440 GB and 64 TB/s for eight), NVLink 5, 1800 GB/s both ways; 400 Gb/s per GPU"
_GB200 = "NVIDIA GB200 NVL72 data sheet (372 GB, 16 TB/s for two), NVLink 5, 1800 GB/s both ways; 400 Gb/s per GPU"
_ETHERNET = "25 Gb/s Ethernet assumed"
_L40S = f"NVIDIA L40S data sheet; PCI Express 4 x16; {_ETHERNET}"
_A6000 = f"NVIDIA RTX A6000 data sheet (half of its figure with sparsity); PCI Express 4 x16; {_ETHERNET}"
_3090 = f"NVIDIA GA102 architecture paper and data sheet, sums in fp32; PCI Express 4 x16; {_ETHERNET}"
_4090 = f"NVIDIA Ada architecture paper and data sheet, sums in fp32; PCI Express 4 x16; {_ETHERNET}"
_5090 = f"NVIDIA RTX Blackwell architecture paper and data sheet, sums in fp32; PCI Express 5 x16; {_ETHERNET}"


def _gpu(
    name: str,
    device: str,
    memory_gib: float,
    bandwidth: float,
    nvlink: float,
    network: float,
    source: str,
    efficiency: Efficiency,
) -> Gpu:
    """Return a GPU with the peaks of what torch calls ``device``."""
    bf16 = peak_flops_of(device, "bf16")
    assert bf16 is not None, device
    fp8 = peak_flops_of(device, "fp8")
    return Gpu(name, memory_gib * GIB, bf16, fp8, bandwidth, nvlink, network, source, efficiency, device)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40g", "NVIDIA A100-SXM4-40GB", 39.4, 1555e9, 300e9, 25e9, _A100, _AMPERE),
        _gpu("a100-80g", "NVIDIA A100-SXM4-80GB", 79.2, 2039e9, 300e9, 25e9, _A100, _AMPERE),
        _gpu("h100-80g", "NVIDIA H100 80GB HBM3", 79.1, 3350e9, 450e9, 50e9, _H100, _HOPPER),
        _gpu("h200-141g", "NVIDIA H200", 139.8, 4800e9, 450e9, 50e9, _H200, _HOPPER),
        _gpu("b200", "NVIDIA B200", 178.3, 8000e9, 900e9, 50e9, _B200, _BLACKWELL),
        _gpu("gb200", "NVIDIA GB200", 184.0, 8000e9, 900e9, 50e9, _GB200, _BLACKWELL),
        _gpu("l40s", "NVIDIA L40S", 44.4, 864e9, 32e9, 3.125e9, _L40S, _WORKSTATION),
        _gpu("rtx-a6000", "NVIDIA RTX A6000", 47.4, 768e9, 32e9, 3.125e9, _A6000, _WORKSTATION),
        _gpu("rtx-3090", "NVIDIA GeForce RTX 3090", 23.6, 936e9, 32e9, 3.125e9, _3090, _GEFORCE),
        _gpu("rtx-4090", "NVIDIA GeForce RTX 4090", 23.6, 1008e9, 32e9, 3.125e9, _4090, _GEFORCE),
        _gpu("rtx-5090", "NVIDIA GeForce RTX 5090", 31.3, 1792e9, 64e9, 3.125e9, _5090, _GEFORCE),
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


CUSTOM = "custom"
"""A GPU that the command line describes."""
DEFAULT = "h100-80g"


@dataclass(frozen=True)
class GivenGpu:
    """What the command line says of a GPU; None where it says nothing."""

    memory_gib: float | None = None
    tflops: float | None = None
    fp8_tflops: float | None = None
    bandwidth: float | None = None
    """GB/s."""
    nvlink: float | None = None
    """GB/s in one direction, in a node."""
    network: float | None = None
    """GB/s in one direction, between nodes."""


def choose_gpu(name: str | None, given: GivenGpu | None = None, rates: Rates | None = None) -> Gpu:
    """Return the GPU to plan for.

    Args:
        name: of the table, or ``custom``; None for the one that was measured, or else the default.
        given: figures in place of the table's.
        rates: what was measured.

    Raises:
        RecipeError: there is none of that name, or too little is known of a custom one.
    """
    given = given or GivenGpu()
    for option, value in vars(given).items():
        if value is not None and not 0 < value < float("inf"):
            raise RecipeError(f"--gpu-{_OPTIONS[option]}: {value:g} is not a positive number; correct it")
    if name is None:
        name = (_measured_name(rates) if rates else None) or (DEFAULT if rates is None else CUSTOM)
    gpu = _custom(given, rates) if name == CUSTOM else find_gpu(name)
    changed: dict[str, Any] = {
        "memory_bytes": given.memory_gib and given.memory_gib * GIB,
        "bf16_flops": given.tflops and given.tflops * 1e12,
        "fp8_flops": given.fp8_tflops and given.fp8_tflops * 1e12,
        "bandwidth": given.bandwidth and given.bandwidth * 1e9,
        "nvlink": given.nvlink and given.nvlink * 1e9,
        "network": given.network and given.network * 1e9,
    }
    return dataclasses.replace(gpu, rates=rates, **{key: value for key, value in changed.items() if value is not None})


_OPTIONS = {field.name: field.name.replace("_", "-") for field in dataclasses.fields(GivenGpu)} | {
    "memory_gib": "memory"
}


def _measured_name(rates: Rates) -> str | None:
    """Return the name in the table of the GPU that was measured, or None."""
    return next((gpu.name for gpu in GPUS.values() if gpu.device == rates.device), None)


def _custom(given: GivenGpu, rates: Rates | None) -> Gpu:
    """Return a GPU of which the table says nothing."""
    memory = given.memory_gib or (rates.memory_gib if rates else None)
    peak = given.tflops and given.tflops * 1e12
    bandwidth = given.bandwidth and given.bandwidth * 1e9
    if rates is not None:
        peak = peak or peak_flops_of(rates.device, "bf16") or max(row[-1] for row in rates.matmul)
        bandwidth = bandwidth or max(row[-1] for row in rates.copy)
    options = {"--gpu-memory GIB": memory, "--gpu-tflops N": peak, "--gpu-bandwidth GB/S": bandwidth}
    missing = [option for option, value in options.items() if not value]
    if memory is None or not peak or not bandwidth:
        raise RecipeError(f"--gpu: custom also needs {', '.join(missing)} (or --measured FILE, from make gpu-check)")
    name = rates.device if rates is not None and rates.device else CUSTOM
    source = "the command line" if rates is None else "the command line, and what was measured"
    return Gpu(name, memory * GIB, peak, None, bandwidth, 32e9, 3.125e9, source, _WORKSTATION)


def find_gpu(name: str) -> Gpu:
    """Return the GPU called ``name``.

    Raises:
        RecipeError: there is none of that name.
    """
    if name not in GPUS:
        raise RecipeError(
            f"--gpu: no figures for {name!r}; take one of {', '.join(GPUS)}, or custom with --gpu-memory, --gpu-tflops"
            " and --gpu-bandwidth"
        )
    return GPUS[name]
