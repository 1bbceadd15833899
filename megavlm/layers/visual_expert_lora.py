"""Linear layers with weights for two kinds of tokens (:mod:`.visual_expert`), and adapters beside each (:mod:`.lora`).

The weight of text keeps its name, and so do its adapters; those of image tokens are the second layer's own, whose name
is ``vision``. Either may have none. A token goes through the adapters of its kind alone.

What is made by A is made of all tokens of this rank by the A of both kinds: no copy of the input is kept for it. It is
as narrow as the rank, and of the other kind's tokens left out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megavlm.layers.arrival import wait_for_weights
from megavlm.layers.lora import Adapter, FrozenColumnParallelLinear, FrozenRowParallelLinear
from megavlm.layers.visual_expert import TwoKinds, cut_in_halves


class AdaptedTwoKindsColumnLinear(TwoKinds, FrozenColumnParallelLinear):
    """[S, 1, in] (S / TP with sequence parallelism) to [S, 1, out / TP], without a bias.

    Args:
        adapter: of the weight of text; None for none.
        image_adapter: of the weight of image tokens.
        quantize: both weights are kept in 4 bits.
        halves: the layer's rows are gate and up, of each of which a rank has a share.
    """

    def __init__(
        self, *args: Any, adapter: Adapter | None, image_adapter: Adapter | None, quantize: bool, halves: bool = False,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, adapter=adapter, quantize=quantize, **kwargs)
        assert self.bias is None and not self.gather_output, "not built here"
        self.vision = FrozenColumnParallelLinear(*args, adapter=image_adapter, quantize=quantize, **kwargs)
        self._halves = halves

    def forward(self, input_: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """Return the output with what the adapters add, and no bias."""
        lows = self._lows(input_)
        if self.sequence_parallel:
            x = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            x = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        return self._both(x, lows), None

    def _lows(self, input_: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return what the A of both kinds make of all positions, [S, 1, rank x parts] each; None where there is no A.

        As in a layer of one kind, of this rank's part of the sequence, if there is one, and gathered behind it.
        """
        wait_for_weights(self.vision)
        own = [linear for linear in (self, self.vision) if linear.adapter is not None]
        if not own:
            return None, None
        x = own[0]._dropped(input_, same_on_all_ranks=not self.sequence_parallel)
        low = torch.cat([F.linear(x, linear.lora_a) for linear in own], dim=-1)  # gathered at once
        if self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            low = copy_to_tensor_model_parallel_region(low, group=self.tp_group)
        parts = iter(low.split([linear.lora_a.size(0) for linear in own], dim=-1))
        text, image = (None if one.adapter is None else next(parts) for one in (self, self.vision))
        return text, image

    def _product(self, linear: Any, x: Tensor, low: Tensor | None) -> Tensor:
        made = super()._product(linear, x, None)
        return made if low is None else made + linear._expanded(low * linear.adapter.scale)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe where the parameters lie in a checkpoint."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self._halves:
            cut_in_halves(state, prefix, sharded_offsets)
        return state


class AdaptedTwoKindsRowLinear(TwoKinds, FrozenRowParallelLinear):
    """[S, 1, in / TP] to [S, 1, out] (S / TP with sequence parallelism), without a bias; arguments likewise."""

    def __init__(
        self, *args: Any, adapter: Adapter | None, image_adapter: Adapter | None, quantize: bool, **kwargs: Any
    ) -> None:
        super().__init__(*args, adapter=adapter, quantize=quantize, **kwargs)
        assert self.bias is None and self.input_is_parallel, "not built here"
        self.vision = FrozenRowParallelLinear(*args, adapter=image_adapter, quantize=quantize, **kwargs)

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        """Return the output with what the adapters add, and no bias."""
        output = self._reduced(self._both(input_))
        kinds = [self] if self.rows is None else [self, self.vision]  # a generated token is text
        own = [linear for linear in kinds if linear.adapter is not None]
        if not own:
            return output, None
        wait_for_weights(self.vision)
        adapter = own[0].adapter
        assert adapter is not None
        x = own[0]._dropped(input_, same_on_all_ranks=False)
        lows = [F.linear(x, linear.lora_a) * adapter.scale for linear in own]
        if self.rows is not None:
            # Zero where a token is of the other kind: so is what its B, which sees a part of the sequence, adds.
            text = (self.rows.back < self.rows.text.numel())[:, None, None]
            lows = [
                low.masked_fill(~text if linear is self else text, 0) for low, linear in zip(lows, own, strict=True)
            ]
        low = self._reduced(torch.cat(lows, dim=-1))
        for part, linear in zip(low.chunk(len(own), dim=-1), own, strict=True):
            output = output + F.linear(part, linear.lora_b)
        return output, None

    def _reduced(self, x: Tensor) -> Tensor:
        """Return the sum over the tensor-parallel ranks; with sequence parallelism, of this rank's positions."""
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(x, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(x, group=self.tp_group)
