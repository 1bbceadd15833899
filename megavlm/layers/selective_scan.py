"""The convolution and the selective scan of Mamba (arXiv 2312.00752) over packs, in plain torch or by its own kernels.

In plain torch both compute in fp32, and make again in the backward pass what they need of their inside: the states of
all positions at once would be ``N`` times as large as what goes in. The scan goes over a pack by blocks; within one,
runs of positions go on side by side, so that Python has some dozens of steps a block and not one a position.

Shape legend: S positions of a pack, C channels of this tensor-parallel rank, N numbers of a channel's state, K taps of
the convolution.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megavlm.layers.segments import to_device
from megavlm.parallel.device import has_kernels

BLOCK = 256
"""Positions of a block of the scan: the state in front of each is kept for the backward pass."""
_RUN = 16
"""Positions of a run."""


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _Again(torch.autograd.Function):
    """A function of tensors that keeps its inputs alone, and is computed again for its gradients."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *tensors: Tensor) -> Any:
        ctx.function = function
        ctx.set_materialize_grads(False)  # nobody asks for the state behind the last block
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        needed = ctx.needs_input_grad[1:]
        inputs = [
            tensor.detach().requires_grad_(learns) for tensor, learns in zip(ctx.saved_tensors, needed, strict=True)
        ]
        # What is kept now is let go of in an instant: nobody around counts it, or moves it elsewhere.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
            made = ctx.function(*inputs)
        made = made if isinstance(made, tuple) else (made,)
        asked = [(one, gradient) for one, gradient in zip(made, gradients, strict=True) if gradient is not None]
        if not asked:
            return None, *(None for _ in needed)
        learns = [one for one in inputs if one.requires_grad]
        outs, given = zip(*asked, strict=True)
        found = iter(torch.autograd.grad(outs, learns, given, allow_unused=True))
        return None, *(next(found) if wanted else None for wanted in needed)


@dataclass(frozen=True)
class Scan:
    """What a layer's scan goes by, but for what its positions say.

    Attributes:
        a_log: [C, N] logarithm of how fast each number decays.
        skip: [C] factor of the input that goes around the scan.
        step_bias: [C] added to the step sizes before their softplus.
    """

    a_log: Tensor
    skip: Tensor
    step_bias: Tensor

    def of(
        self, x_SC: Tensor, step_SC: Tensor, in_SN: Tensor, out_SN: Tensor, gate_SC: Tensor, fresh_S: Tensor,
        state_CN: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return what comes out [S, C], in the number type of ``x_SC``, and the state behind it [C, N] in fp32.

        Args:
            x_SC: what goes in.
            step_SC: step sizes, before bias and softplus.
            in_SN: what the input is multiplied by where it goes into the state (B).
            out_SN: what the state is multiplied by where it comes out (C).
            gate_SC: what comes out is multiplied by its SiLU.
            fresh_S: bool; the state begins anew there, at zeros.
            state_CN: in front of the first position; None for zeros.
        """
        state = x_SC.new_zeros(self.a_log.shape, dtype=torch.float32) if state_CN is None else state_CN
        parts = []
        for at in range(0, x_SC.size(0), BLOCK):
            own = slice(at, at + BLOCK)
            made, state = _Again.apply(
                _block, state, self.a_log, self.skip, self.step_bias, x_SC[own], step_SC[own], in_SN[own], out_SN[own],
                gate_SC[own], fresh_S[own],
            )  # fmt: skip
            parts.append(made)
        return parts[0] if len(parts) == 1 else torch.cat(parts), state


def _block(
    state_CN: Tensor, a_log: Tensor, skip: Tensor, step_bias: Tensor, x_SC: Tensor, step_SC: Tensor, in_SN: Tensor,
    out_SN: Tensor, gate_SC: Tensor, fresh_S: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what comes out of a block, and the state behind it."""
    x, step = x_SC.float(), F.softplus(step_SC.float() + step_bias.float())
    decay_SCN = torch.exp(step.unsqueeze(-1) * -torch.exp(a_log.float())) * (~fresh_S)[:, None, None]
    states_SCN, last_CN = _recurrence(state_CN, decay_SCN, (step * x).unsqueeze(-1) * in_SN.float().unsqueeze(1))
    y_SC = torch.einsum("scn,sn->sc", states_SCN, out_SN.float()) + x * skip.float()
    return (y_SC * F.silu(gate_SC.float())).to(x_SC.dtype), last_CN


def _recurrence(state_CN: Tensor, decay_SCN: Tensor, added_SCN: Tensor) -> tuple[Tensor, Tensor]:
    """Return all ``state[t] = decay[t] * state[t - 1] + added[t]`` [S, C, N], and the last one.

    Runs of positions go on side by side, each from zeros; then each gets what the one before it ends with, times the
    product of its decays up to each position.
    """
    length = decay_SCN.size(0)
    run = min(_RUN, length)
    rest = -length % run
    if rest:  # behind the end nothing decays, and nothing is added
        decay_SCN = F.pad(decay_SCN, (0, 0, 0, 0, 0, rest), value=1.0)
        added_SCN = F.pad(added_SCN, (0, 0, 0, 0, 0, rest))
    decays, adds = (each.unflatten(0, (-1, run)).unbind(1) for each in (decay_SCN, added_SCN))
    own, products = [adds[0]], [decays[0]]
    for decay, added in zip(decays[1:], adds[1:], strict=True):
        own.append(torch.addcmul(added, decay, own[-1]))
        products.append(products[-1] * decay)
    before = [state_CN]
    for product, end in zip(products[-1].unbind(), own[-1].unbind(), strict=True):
        before.append(torch.addcmul(end, product, before[-1]))
    begins = torch.stack(before[:-1]).unsqueeze(1)
    states = torch.addcmul(torch.stack(own, 1), torch.stack(products, 1), begins).flatten(0, 1)
    return states[:length], before[-1]


def causal_convolution(x_SC: Tensor, weight_CK: Tensor, bias_C: Tensor, place_S: Tensor) -> Tensor:
    """Return SiLU of each channel's convolution over the last K positions of its segment, [S, C].

    Args:
        x_SC: what goes in.
        weight_CK: the last tap is the position's own.
        bias_C: added to it.
        place_S: int64 place of each position in its segment.
    """
    found: Tensor = _Again.apply(_convolution, x_SC, weight_CK, bias_C, place_S)
    return found


def _convolution(x_SC: Tensor, weight_CK: Tensor, bias_C: Tensor, place_S: Tensor) -> Tensor:
    x, taps = x_SC.float(), weight_CK.float().unbind(1)
    found = x * taps[-1] + bias_C.float()
    for back, tap in enumerate(reversed(taps[:-1]), start=1):
        seen = F.pad(x, (0, 0, back, 0))[: x.size(0)] * (place_S >= back).unsqueeze(1)
        found = found + seen * tap
    return F.silu(found).to(x_SC.dtype)


@functools.cache
def kernels() -> tuple[Any, Any] | None:
    """Return ``selective_scan_fn`` of mamba-ssm and ``causal_conv1d_fn`` of causal-conv1d, or None.

    They are there where CUDA is and both are installed; plain torch, without them, is many times slower on a GPU.
    """
    if not has_kernels():
        return None
    try:
        from causal_conv1d import causal_conv1d_fn  # type: ignore[import-not-found]  # noqa: PLC0415
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # type: ignore  # noqa: PLC0415
    except ImportError:
        return None
    return selective_scan_fn, causal_conv1d_fn


def kernel_convolution(x_SC: Tensor, weight_CK: Tensor, bias_C: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return :func:`causal_convolution` by causal-conv1d's kernel (not run on a GPU)."""
    found = kernels()
    assert found is not None
    numbers = torch.repeat_interleave(torch.tensor(lengths)).to(torch.int32)
    segment_1S = to_device(numbers, x_SC.device)[None]
    # Its layout with the channels last in memory, which its segments ask for.
    y_1CS: Tensor = found[1](x_SC.contiguous().T[None], weight_CK, bias_C, seq_idx=segment_1S, activation="silu")
    return y_1CS[0].T


def kernel_scan(
    scan: Scan, x_SC: Tensor, step_SC: Tensor, in_SN: Tensor, out_SN: Tensor, gate_SC: Tensor
) -> tuple[Tensor, Tensor]:
    """Return :meth:`Scan.of` of one segment from zeros, by mamba-ssm's kernel without packs (not run on a GPU)."""
    found = kernels()
    assert found is not None
    x, step, into, out, gate = (each.T[None].contiguous() for each in (x_SC, step_SC, in_SN, out_SN, gate_SC))
    y_1CS, last_1CN = found[0](
        x, step, -torch.exp(scan.a_log.float()), into, out, scan.skip.float(), gate, scan.step_bias.float(),
        delta_softplus=True, return_last_state=True,
    )  # fmt: skip
    return y_1CS[0].T, last_1CN[0]
