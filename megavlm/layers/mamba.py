"""Mamba's mixer (arXiv 2312.00752): what stands in a layer where others attend; there is no MLP.

It is the first Mamba, with a decay for each number of each channel's state. (Megatron-Core's ``MambaMixer`` is Mamba-2,
and cannot be imported without Triton.) Tensor-parallel ranks share the channels: each has its own convolution and scan.
Step sizes and what goes in and out of the states follow from all channels, so ``x_proj`` sums over ranks. With sequence
parallelism ``in_proj`` gathers the sequence and ``out_proj`` scatters it; between them each rank has all of it.

Shape legend: S positions of a pack, E width of the stream, C channels of this tensor-parallel rank, N numbers of a
channel's state, R rank of the step sizes, K taps of the convolution.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megavlm.layers.arrival import wait_for_weights
from megavlm.layers.segments import segment_lengths, to_device
from megavlm.layers.selective_scan import Scan, causal_convolution, kernel_convolution, kernel_scan, kernels

_STEPS = (0.001, 0.1, 1e-4)
"""Of a new layer's step sizes: least, most, and what none is below (``time_step_min``, ``_max``, ``_floor``)."""


@dataclass
class MambaSubmodules:
    """The linear layers of :class:`MambaMixer`."""

    in_proj: Any
    x_proj: Any
    out_proj: Any


class KeptStates(Protocol):
    """States of prompts that answers go on from (``megavlm.inference.cache``)."""

    @property
    def goes_on(self) -> bool:
        """Whether answers go on, and no prompt is read."""

    @property
    def rows(self) -> range:
        """The rows of the answers that go on, or of the prompts, in the order of their segments."""

    def states(self, shapes: Sequence[tuple[int, ...]], like: Tensor) -> tuple[Tensor, ...]:
        """Return what is kept, [rows, ..] each, the last one in fp32; zeros at first."""


@dataclass(frozen=True)
class SegmentPlaces:
    """Where the positions of a pack are in their segments."""

    place: Tensor
    """[S] int64, from 0."""
    fresh: Tensor
    """[S] bool: the first of a segment."""

    @staticmethod
    def of(packed: PackedSeqParams, device: torch.device) -> SegmentPlaces:
        """Return those of a pack, made once for all layers."""
        told: Any = packed
        known: SegmentPlaces | None = getattr(told, "mamba_places", None)
        if known is None:
            place = torch.cat([torch.arange(length) for length in segment_lengths(packed)])
            place = to_device(place, device)
            known = told.mamba_places = SegmentPlaces(place, place == 0)
        return known


class _ChannelParameters(nn.Module):
    """Parameters by channel, of which each tensor-parallel rank has its channels'."""

    def __init__(self, tp_group: Any, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        super().__init__()
        self.tp_group = tp_group
        for name, shape in shapes.items():
            parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
            setattr(self, name, parameter)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe where the parameters lie in a checkpoint."""
        own = self.state_dict(keep_vars=True)
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            own, prefix, dict.fromkeys(own, 0), sharded_offsets, tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )  # fmt: skip
        return state


class MambaMixer(MegatronModule):
    """[S, 1, E] to [S, 1, E]; with sequence parallelism both are this rank's positions.

    Args:
        config: of the language model.
        submodules: its linear layers.
        layer_number: of its layer.
        channels: of all ranks.
        state_size: N.
        time_step_rank: R.
        taps: K.
    """

    def __init__(
        self, config: TransformerConfig, submodules: MambaSubmodules, layer_number: int, *, channels: int,
        state_size: int, time_step_rank: int, taps: int, pg_collection: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        super().__init__(config=config)
        self.tp_group = pg_collection.tp
        self.state_size, self.time_step_rank = state_size, time_step_rank
        self._channels = channels
        own = channels // self.tp_group.size()
        # Between the two layers that gather and scatter the sequence each rank has all of it.
        inside = copy.copy(config)
        inside.sequence_parallel = False
        common = {"bias": False, "is_expert": False, "tp_comm_buffer_name": None, "tp_group": self.tp_group}
        row = {**common, "input_is_parallel": True}
        self.in_proj = build_module(
            submodules.in_proj, config.hidden_size, 2 * channels, config=config, init_method=config.init_method,
            gather_output=False, skip_bias_add=False, stride=2, **common,
        )  # fmt: skip
        self.conv1d: Any = _ChannelParameters(
            self.tp_group, {"weight": (own, 1, taps), "bias": (own,)}, config.params_dtype
        )
        self.x_proj = build_module(
            submodules.x_proj, channels, time_step_rank + 2 * state_size, config=inside,
            init_method=config.init_method, skip_bias_add=False, **row,
        )  # fmt: skip
        self.dt_proj: Any = _ChannelParameters(
            self.tp_group, {"weight": (own, time_step_rank), "bias": (own,)}, config.params_dtype
        )
        self.ssm: Any = _ChannelParameters(
            self.tp_group, {"A_log": (own, state_size), "D": (own,)}, config.params_dtype
        )
        self.out_proj = build_module(
            submodules.out_proj, channels, config.hidden_size, config=config,
            init_method=config.output_layer_init_method, skip_bias_add=True, **row,
        )  # fmt: skip
        self.kept: KeptStates | None = None
        if config.perform_initialization:
            self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        """Fill what the linear layers do not, as the published code begins."""
        least, most, floor = _STEPS

        def steps(bias: Tensor) -> None:
            step = torch.exp(bias.uniform_(math.log(least), math.log(most))).clamp(min=floor)
            bias.copy_(step + torch.log(-torch.expm1(-step)))  # of which softplus makes the step

        taps, rank = self.conv1d.weight.size(-1), self.time_step_rank
        self._drawn(self.conv1d.weight, lambda w: w.uniform_(-(taps**-0.5), taps**-0.5))
        self._drawn(self.dt_proj.weight, lambda w: w.uniform_(-(rank**-0.5), rank**-0.5))
        self._drawn(self.dt_proj.bias, steps)
        self.ssm.A_log.copy_(torch.arange(1, self.state_size + 1, dtype=torch.float32).log().expand_as(self.ssm.A_log))
        self.ssm.D.fill_(1.0)

    def _drawn(self, parameter: Tensor, draw: Callable[[Tensor], Any]) -> None:
        """Fill a parameter with random numbers: on CPUs those of all ranks are drawn, and each takes its own."""
        if not self.config.use_cpu_initialization:
            with get_cuda_rng_tracker().fork():
                draw(parameter)
            return
        whole = torch.zeros(self._channels, *parameter.shape[1:])
        draw(whole)
        parameter.copy_(whole.chunk(self.tp_group.size())[self.tp_group.rank()])

    @property
    def _scan(self) -> Scan:
        return Scan(self.ssm.A_log, self.ssm.D, self.dt_proj.bias)

    def forward(
        self, hidden_states: Tensor, *_: Any, packed_seq_params: PackedSeqParams, **__: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return [S, 1, E], and no bias.

        Args:
            hidden_states: the stream behind its norm.
            packed_seq_params: the segments: convolution and state begin anew in each.
        """
        mixed, _bias = self.in_proj(hidden_states)
        wait_for_weights(self.conv1d, self.dt_proj, self.ssm)  # which nobody calls
        x_SC, gate_SC = mixed.squeeze(1).chunk(2, dim=-1)
        if self.kept is not None and self.kept.goes_on:
            y_SC = self._next(self.kept, x_SC, gate_SC)
        else:
            y_SC = self._whole(x_SC, gate_SC, packed_seq_params)
        output, bias = self.out_proj(y_SC.unsqueeze(1))
        return output, bias

    def _projected(self, x_SC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return step sizes [S, C], and what goes into states and out of them [S, N], of all channels."""
        # Each rank uses what all of them make for its own channels: its gradient is the sum of theirs.
        small_S = copy_to_tensor_model_parallel_region(self.x_proj(x_SC.unsqueeze(1))[0], group=self.tp_group)
        step_SR, in_SN, out_SN = small_S.squeeze(1).split(
            [self.time_step_rank, self.state_size, self.state_size], dim=-1
        )
        return F.linear(step_SR, self.dt_proj.weight), in_SN, out_SN

    def _whole(self, x_SC: Tensor, gate_SC: Tensor, packed: PackedSeqParams) -> Tensor:
        """Return what comes out [S, C] of a pack, each segment of which begins anew."""
        places, weight, bias = SegmentPlaces.of(packed, x_SC.device), self.conv1d.weight.squeeze(1), self.conv1d.bias
        lengths = segment_lengths(packed)
        assert sum(lengths) == x_SC.size(0), f"{sum(lengths)} positions, not {x_SC.size(0)}"
        if kernels() is None:
            seen_SC = causal_convolution(x_SC, weight, bias, places.place)
        else:
            seen_SC = kernel_convolution(x_SC, weight, bias, lengths)
        inputs = (seen_SC, *self._projected(seen_SC), gate_SC)
        if kernels() is None and self.kept is None:
            return self._scan.of(*inputs, places.fresh)[0]
        parts, ends = [], []
        for segment in zip(*(each.split(lengths) for each in (*inputs, places.fresh)), strict=True):
            part, end = self._scan.of(*segment) if kernels() is None else kernel_scan(self._scan, *segment[:-1])
            parts.append(part)
            ends.append(end)
        if self.kept is not None:
            self._remember(self.kept, x_SC.split(lengths), ends)
        return torch.cat(parts)

    def _states(self, kept: KeptStates, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last inputs [rows, C, K - 1] and the states [rows, C, N] that are kept."""
        own, _, taps = self.conv1d.weight.shape
        last, states = kept.states([(own, taps - 1), (own, self.state_size)], like)
        return last, states

    def _remember(self, kept: KeptStates, inputs: Sequence[Tensor], ends: Sequence[Tensor]) -> None:
        """Keep what the end of each prompt goes on from; the last segment may be padding."""
        last, states = self._states(kept, inputs[0])
        for row, x_SC, end_CN in zip(kept.rows, inputs, ends, strict=False):
            last[row] = F.pad(x_SC.T, (last.size(-1), 0))[:, x_SC.size(0) :]
            states[row] = end_CN

    def _next(self, kept: KeptStates, x_SC: Tensor, gate_SC: Tensor) -> Tensor:
        """Return what comes out of one new position per row; positions behind the rows get zeros."""
        last_RCK, states_RCN = self._states(kept, x_SC)
        rows, count = slice(kept.rows.start, kept.rows.stop), len(kept.rows)
        taps_RCK = torch.cat((last_RCK[rows], x_SC[:count].unsqueeze(-1)), dim=-1)
        last_RCK[rows] = taps_RCK[..., 1:]
        convolved = (taps_RCK.float() * self.conv1d.weight.squeeze(1).float()).sum(-1) + self.conv1d.bias.float()
        x_RC = F.silu(convolved).to(x_SC.dtype)
        step_RC, in_RN, out_RN = self._projected(x_RC)
        scan, x = self._scan, x_RC.float()
        step = F.softplus(step_RC.float() + scan.step_bias.float())
        decay_RCN = torch.exp(step.unsqueeze(-1) * -torch.exp(scan.a_log.float()))
        states = decay_RCN * states_RCN[rows] + (step * x).unsqueeze(-1) * in_RN.float().unsqueeze(1)
        states_RCN[rows] = states
        y_RC = (states * out_RN.float().unsqueeze(1)).sum(-1) + x * scan.skip.float()
        y_RC = (y_RC * F.silu(gate_SC[:count].float())).to(x_SC.dtype)
        return F.pad(y_RC, (0, 0, 0, x_SC.size(0) - count))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe where the parameters lie in a checkpoint: of ``in_proj`` each rank has a share of both halves."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        key = f"{prefix}in_proj.weight"
        state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets)
        return state
