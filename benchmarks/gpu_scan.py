"""One job of ``gpu_check``: Mamba's convolution and scan of a pack, against the recurrence written out in fp32.

The published definition is Mamba's (arXiv 2312.00752, equations 2 and 3 with the steps of section 3.2; in
state-spaces/mamba ``selective_scan_ref``): one position after the other, each segment from zeros.

Shape legend: S positions of a pack, C channels, N numbers of a channel's state, K taps of the convolution.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

NAMES = ("x", "gate", "step", "into", "out", "taps", "bias", "a_log", "skip", "step_bias")
"""What is differentiated: of the positions x, gate, step sizes, B, C; of the channels the rest."""


def lengths_of(positions: int) -> list[int]:
    """Return the segments of a pack: two of lengths that divide nothing, and one of a single position between."""
    return [positions // 2 + 3, 1, positions - positions // 2 - 4]


def scan(job: dict[str, Any]) -> dict[str, Any]:
    """Hold torch's way, and Mamba's own kernels where these are, against the definition; time both.

    Returns:
        ``torch`` and, with kernels, ``kernel``: the largest difference of outputs and of each gradient, relative to the
        largest value. ``torch_ms``, ``kernel_ms``: forward and backward.
    """
    from megavlm.parallel.device import has_cuda, local_device, prepare_device

    prepare_device()
    import torch

    from megavlm.layers.selective_scan import Scan, causal_convolution, kernel_convolution, kernel_scan, kernels

    positions, channels, numbers, taps = (96, 32, 4, 4) if job.get("small") else (2048, 5120, 16, 4)
    device, lengths = local_device(), lengths_of(positions)
    given = _drawn(positions, channels, numbers, taps)
    place = torch.cat([torch.arange(length) for length in lengths]).to(device)

    def plain(x: Tensor, gate: Tensor, step: Tensor, into: Tensor, out: Tensor, *own: Tensor) -> Tensor:
        weight, bias, *rest = own
        seen = causal_convolution(x, weight, bias, place)
        return Scan(*rest).of(seen, step, into, out, gate, place == 0)[0]

    def kernel(x: Tensor, gate: Tensor, step: Tensor, into: Tensor, out: Tensor, *own: Tensor) -> Tensor:
        weight, bias, *rest = own
        inputs = (kernel_convolution(x, weight, bias, lengths), step, into, out, gate)
        segments = zip(*(each.split(lengths) for each in inputs), strict=True)
        return torch.cat([kernel_scan(Scan(*rest), *segment)[0] for segment in segments])

    def defined(*tensors: Tensor) -> Tensor:
        return written_out(lengths, *(each.float() for each in tensors))

    _, expected = _timed(defined, given, device, times=1)
    found: dict[str, Any] = {"device": "cuda" if has_cuda() else "cpu"}
    for name, work in {"torch": plain, **({"kernel": kernel} if kernels() is not None else {})}.items():
        seconds, made = _timed(work, given, device, times=2 if job.get("small") else 6)
        found[f"{name}_ms"] = 1e3 * seconds
        found[name] = {what: _apart(made[what], expected[what]) for what in expected}
    return found


def _drawn(positions: int, channels: int, numbers: int, taps: int) -> list[Tensor]:
    """Return what goes in, by ``NAMES``: bf16 but for what decides of the decays."""
    import torch

    draw = torch.Generator().manual_seed(1)
    shapes = [*[(positions, channels)] * 3, *[(positions, numbers)] * 2, (channels, taps), (channels,)]
    found = [torch.randn(*shape, generator=draw).bfloat16() for shape in shapes]
    a_log = torch.rand(channels, numbers, generator=draw)
    skip, step_bias = (torch.randn(channels, generator=draw) for _ in range(2))
    return [*found, a_log, skip / 8, step_bias - 3]  # most of what comes out comes out of states


def written_out(
    lengths: list[int], x: Tensor, gate: Tensor, step: Tensor, into: Tensor, out: Tensor, taps: Tensor, bias: Tensor,
    a_log: Tensor, skip: Tensor, step_bias: Tensor,
) -> Tensor:  # fmt: skip
    """Return what comes out [S, C]; arguments by ``NAMES``."""
    import torch
    import torch.nn.functional as F

    parts = []
    for x_SC, gate_SC, step_SC, in_SN, out_SN in zip(
        *(each.split(lengths) for each in (x, gate, step, into, out)), strict=True
    ):
        padded = F.pad(x_SC.T, (taps.size(1) - 1, 0))
        seen_SC = F.silu(F.conv1d(padded[None], taps.unsqueeze(1), bias, groups=len(taps))[0].T)
        size_SC = F.softplus(step_SC + step_bias)
        state_CN, found = torch.zeros_like(a_log), []
        for t in range(len(x_SC)):
            decay_CN = torch.exp(size_SC[t][:, None] * -torch.exp(a_log))
            state_CN = decay_CN * state_CN + (size_SC[t] * seen_SC[t])[:, None] * in_SN[t]
            found.append(state_CN @ out_SN[t] + skip * seen_SC[t])
        parts.append(torch.stack(found) * F.silu(gate_SC))
    return torch.cat(parts)


def _timed(work: Any, given: list[Tensor], device: Any, *, times: int) -> tuple[float, dict[str, Tensor]]:
    """Return the median seconds of all passes but the first, and output and gradients of the last one."""
    from megavlm.parallel.device import synchronize

    seconds = []
    for _ in range(times):
        inputs = [each.clone().to(device).requires_grad_() for each in given]
        synchronize()
        start = time.perf_counter()
        made = work(*inputs)
        made.float().square().mean().backward()
        synchronize()
        seconds.append(time.perf_counter() - start)
    gradients = {name: each.grad.float() for name, each in zip(NAMES, inputs, strict=True) if each.grad is not None}
    return float(np.median(seconds[1:] or seconds)), {"output": made.detach().float(), **gradients}


def _apart(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).abs().max() / expected.abs().max())
