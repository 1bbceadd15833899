"""Several streams in the one tensor that goes from pipeline stage to pipeline stage.

Megatron-Core's interleaved schedule sends tensors of one shape, and one of them. What goes beside the residual stream
(``BESIDE`` of ``megavlm.models.fusion``) therefore stands behind it, along the sequence: 1 + R streams of S rows each,
which the schedule takes for a sequence of (1 + R) * S. All boundaries carry as many streams as the widest needs, which
is the first; those that are used up are zeros. Where the first chunk has all layers that take one, nothing is added.

Shape legend: S positions (with sequence parallelism this rank's part), E width of the language model, R streams beside
the residual one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from torch import Tensor


@dataclass(frozen=True)
class Streams:
    """The streams of one chunk.

    Args:
        enter: R streams beside the residual one that its first layer finds.
        used: how many of them its layers take.
        carried: how many go over every boundary between chunks.
    """

    enter: int
    used: int
    carried: int

    @staticmethod
    def of_chunk(levels: int, first_layer: int, layers: int, first_chunk_layers: int) -> Streams:
        """Return those of a chunk, where the first ``levels`` layers of the model take one each.

        Args:
            levels: so many.
            first_layer: of the chunk, counted from 0.
            layers: of the chunk.
            first_chunk_layers: layers of the model's first chunk.
        """
        enter = max(levels - first_layer, 0)
        return Streams(enter, min(enter, layers), max(levels - first_chunk_layers, 0))

    def split(self, received: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the residual stream [S, 1, E] and the others [R * S, 1, E] of what came from the chunk before."""
        if not self.carried:
            return received, None
        rows = received.size(0) // (1 + self.carried)
        others = received[rows : rows * (1 + self.enter)]
        return received[:rows], others if self.enter else None

    def join(self, hidden_S1E: Tensor, others: Tensor | None) -> Tensor:
        """Return what goes to the next chunk: the layers' output, and what they have left of the others."""
        if not self.carried:
            return hidden_S1E
        rows = hidden_S1E.size(0)
        left = hidden_S1E[:0] if others is None else others[self.used * rows :]
        nothing = hidden_S1E.new_zeros(rows * self.carried - left.size(0), *hidden_S1E.shape[1:])
        return torch.cat([hidden_S1E, left, nothing])


def one_after_the_other(beside_S1R: Tensor, width: int, *, sequence_parallel: bool) -> Tensor:
    """Return streams [S, 1, R * E] as [R * S, 1, E]; with sequence parallelism this rank's rows of each."""
    if sequence_parallel:
        beside_S1R = scatter_to_sequence_parallel_region(beside_S1R)
    return beside_S1R.unflatten(-1, (-1, width)).transpose(0, 2).flatten(0, 2).unsqueeze(1).contiguous()
