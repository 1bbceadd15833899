"""Language layers whose linear layers have a second set of weights, for image tokens (CogVLM, arXiv 2311.03079).

Attention is over all tokens together; queries, keys, values, what comes of the heads, and the MLP are each made by the
weights of a token's kind. Of the slots of a picture all but the last one are image tokens: that takes the weights of
text, as in the published code (``get_expert_mask`` of CogVLM's modeling file), in which it is the vector that ends the
picture. Pictures with nothing between them are one there, and here.

Which tokens are of which kind the pack tells every layer, on every stage (``megavlm/data/spans.py``): also where a
layer is recomputed, while other packs are on their way.

Shape legend: S positions of a pack, I of them image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megavlm.layers.arrival import wait_for_weights
from megavlm.layers.segments import segment_lengths, to_device, two_way_spans

VISION = "vision"
"""Name of the second layer in the one of text, whose own weight keeps its name."""


@dataclass(frozen=True)
class KindRows:
    """Which positions of a pack are of which kind, as rows on the device."""

    text: Tensor
    """[S - I] int64."""
    image: Tensor
    """[I] int64."""
    back: Tensor
    """[S] int64: where each position is among both, text first."""

    @staticmethod
    def of(spans: Sequence[tuple[int, int]], length: int, device: torch.device) -> KindRows:
        """Return those of a pack of ``length`` positions whose pictures lie at ``spans``."""
        image_S = np.zeros(length, np.bool_)
        for start, stop in spans:
            image_S[start : stop - 1] = True
        order = np.concatenate([np.flatnonzero(~image_S), np.flatnonzero(image_S)])
        back = np.empty_like(order)
        back[order] = np.arange(length)
        text = int((~image_S).sum())
        found = [to_device(torch.from_numpy(one), device) for one in (order[:text], order[text:], back)]
        return KindRows(*found)


def kind_rows(packed: PackedSeqParams, device: torch.device) -> KindRows | None:
    """Return the rows of a pack, made once for all layers; None where nobody told its spans (a generated token)."""
    spans = two_way_spans(packed)
    told: Any = packed
    if spans is None:
        return None
    known: KindRows | None = getattr(told, "kind_rows", None)
    if known is None:
        known = KindRows.of(spans, sum(segment_lengths(packed)), device)
        told.kind_rows = known
    return known


class TwoKinds:
    """What column- and row-parallel layers with weights for two kinds of tokens share."""

    rows: KindRows | None = None
    weight: Tensor
    vision: Any
    gradient_accumulation_fusion: bool
    tp_group: Any

    def _both(self, x_S1X: Tensor, lows: tuple[Tensor | None, Tensor | None] = (None, None)) -> Tensor:
        """Return [S, 1, Y] of all positions: of this rank's share of the weights, neither gathered nor reduced.

        ``lows`` are what the adapters of both kinds made of all positions, if the layer adds it here.
        """
        rows, (low, low_image) = self.rows, lows
        if rows is None:
            assert not torch.is_grad_enabled(), "packs with pictures told apart: make_pack(.., spans=spans_of(..))"
            return self._product(self, x_S1X, low)
        assert rows.back.numel() == x_S1X.size(0), f"{rows.back.numel()} positions, not {x_S1X.size(0)}"
        wait_for_weights(self.vision)  # which nobody calls
        parts = [
            # Also of no tokens at all: the weights' gradients are then zero, and not missing.
            self._product(linear, x_S1X.index_select(0, own), None if told is None else told.index_select(0, own))
            for linear, own, told in ((self, rows.text, low), (self.vision, rows.image, low_image))
        ]
        return torch.cat(parts).index_select(0, rows.back)

    def _product(self, linear: Any, x: Tensor, low: Tensor | None) -> Tensor:
        """Return what the weight of ``linear``, this layer or its second one, makes of tokens of its kind."""
        assert low is None, "adapters are those of visual_expert_lora.py"
        made: Tensor = linear._forward_impl(
            input=x, weight=linear.weight, bias=None, gradient_accumulation_fusion=self.gradient_accumulation_fusion,
            allreduce_dgrad=False, sequence_parallel=False, grad_output_buffer=None, wgrad_deferral_limit=None,
            tp_group=self.tp_group,
        )  # fmt: skip
        return made

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe where the parameters lie in a checkpoint."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        # Megatron-Core's layer takes all but its weight for the same on all ranks.
        return state | self.vision.sharded_state_dict(f"{prefix}{VISION}.", sharded_offsets, metadata)


class TwoKindsColumnLinear(TwoKinds, ColumnParallelLinear):
    """[S, 1, in] (S / TP with sequence parallelism) to [S, 1, out / TP], without a bias.

    Args:
        halves: the layer's rows are gate and up, of each of which a rank has a share.
    """

    def __init__(self, *args: Any, halves: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.bias is None and not self.gather_output, "not built here"
        self.vision, self._halves = ColumnParallelLinear(*args, **kwargs), halves

    def forward(self, input_: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """Return the output, and no bias."""
        if self.sequence_parallel:
            x = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            x = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        return self._both(x), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe where the parameters lie in a checkpoint.

        Megatron-Core's MLP does itself what gate and up ask of the weight of text.
        """
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self._halves:
            cut_in_halves(state, prefix, sharded_offsets)
        return state


class TwoKindsRowLinear(TwoKinds, RowParallelLinear):
    """[S, 1, in / TP] to [S, 1, out] (S / TP with sequence parallelism), without a bias."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.bias is None and self.input_is_parallel, "not built here"
        self.vision = RowParallelLinear(*args, **kwargs)

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        """Return the output, and no bias."""
        made = self._both(input_)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(made, group=self.tp_group), None
        return reduce_from_tensor_model_parallel_region(made, group=self.tp_group), None


def cut_in_halves(state: dict[str, Any], prefix: str, sharded_offsets: Any) -> None:
    """Describe the weight of image tokens as gate and up, of each of which a rank has a share."""
    key = f"{prefix}{VISION}.weight"
    if key in state:  # not where it is kept in 4 bits
        state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets)


class VisualExpertLayer(TransformerLayer):
    """Megatron-Core's layer, which tells its linear layers which positions are image tokens."""

    def forward(self, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        """Run the layer; arguments as of Megatron-Core's."""
        hidden = args[0] if args else kwargs["hidden_states"]
        rows = None if packed_seq_params is None else kind_rows(packed_seq_params, hidden.device)
        attention, mlp = self.self_attention, self.mlp
        for linear in (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2):
            linear.rows = rows
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)
