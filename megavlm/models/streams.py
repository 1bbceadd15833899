"""Several streams in the one tensor that goes from pipeline stage to pipeline stage.

Megatron-Core's interleaved schedule sends tensors of one shape, and one of them. What goes beside the residual stream
(``BESIDE`` of ``megavlm.models.fusion``) therefore stands behind it, along the sequence: 1 + R streams of S rows each,
which the schedule takes for a sequence of (1 + R) * S. All boundaries carry as many streams as the widest needs, which
is the first; those that are used up are zeros. Where the first chunk has all layers that take one, nothing is added.

Shape legend: S positions (with sequence parallelism this rank's part), E width of the language model, R streams beside
the residual one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
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
    taken: bool = True

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

    def split(self, received: Tensor, _own: int) -> tuple[Tensor, Tensor | None]:
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


@dataclass
class PictureStream:
    """Features of pictures that layers attend to, behind the residual stream: of each micro-batch as many as it has.

    Megatron-Core's schedules send tensors of one shape, so that over the boundaries of a pass all micro-batches have as
    many rows as the one with most, the rest zeros; within a chunk each has its own.

    Args:
        taken: whether layers of the chunk attend to them.
        rows: of the stream's width E that go over every boundary, with sequence parallelism this rank's
            (:func:`megavlm.parallel.pipeline.run` says it).
        width: of a feature, C, where it is another than the stream's; features go over boundaries one behind the other
            then, cut into rows of E.
    """

    taken: bool
    rows: int = 0
    carried: int = 0
    width: int | None = None

    @staticmethod
    def of_chunk(cross_layers: Sequence[int], first_layer: int, layers: int, width: int | None = None) -> PictureStream:
        """Return that of a chunk, whose first layer is counted from 0."""
        return PictureStream(any(first_layer <= one < first_layer + layers for one in cross_layers), width=width)

    def rows_for(self, features: int, embed: int) -> int:
        """Return the rows of a stream of width ``embed`` that so many features take."""
        return features if self.width is None else -(-features * self.width // embed)

    def split(self, received: Tensor, own: int) -> tuple[Tensor, Tensor | None]:
        """Return the residual stream [S, 1, E], and ``own`` features [F, 1, C]; None for a micro-batch without."""
        length = received.size(0) - self.rows
        if not own:
            return received[:length], None
        if self.width is None:
            return received[:length], received[length : length + own]
        flat = received[length : length + self.rows_for(own, received.size(-1))].flatten()
        return received[:length], flat[: own * self.width].view(own, 1, self.width)

    def join(self, hidden_S1E: Tensor, features_F1C: Tensor | None) -> Tensor:
        """Return what goes to the next chunk."""
        parts = [hidden_S1E]
        if features_F1C is not None:
            parts.append(features_F1C if self.width is None else _in_rows(features_F1C, hidden_S1E.size(-1)))
        if missing := hidden_S1E.size(0) + self.rows - sum(map(len, parts)):
            parts.append(hidden_S1E.new_zeros(missing, *hidden_S1E.shape[1:]))
        return torch.cat(parts) if len(parts) > 1 else hidden_S1E


def _in_rows(features_F1C: Tensor, embed: int) -> Tensor:
    """Return the numbers of features in rows [R, 1, E], zeros behind the last."""
    flat = features_F1C.flatten()
    return F.pad(flat, (0, -flat.size(0) % embed)).view(-1, 1, embed)


def one_after_the_other(beside_S1R: Tensor, width: int, *, sequence_parallel: bool) -> Tensor:
    """Return streams [S, 1, R * E] as [R * S, 1, E]; with sequence parallelism this rank's rows of each."""
    if sequence_parallel:
        beside_S1R = scatter_to_sequence_parallel_region(beside_S1R)
    return beside_S1R.unflatten(-1, (-1, width)).transpose(0, 2).flatten(0, 2).unsqueeze(1).contiguous()


def cut_for_ranks(features_F1E: Tensor) -> Tensor:
    """Return this tensor-parallel rank's rows of features, filled up with zeros to a multiple of the ranks."""
    missing = -features_F1E.size(0) % mpu.get_tensor_model_parallel_world_size()
    if missing:
        features_F1E = torch.cat([features_F1E, features_F1E.new_zeros(missing, *features_F1E.shape[1:])])
    return scatter_to_sequence_parallel_region(features_F1E)
