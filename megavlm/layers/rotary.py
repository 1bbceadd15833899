"""Rotary positions of a pack: every token's angle is looked up once per micro-batch, and no layer asks for lengths.

Megatron-Core's unfused form for packs reads the segment lengths back from the device in every layer, for queries and
for keys, and gathers the same angles each time. Here the model hands the layers one angle per position of the pack.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core.jit import jit_fuser
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from megavlm.layers.segments import segment_positions

_plain_thd = rope_utils._apply_rotary_pos_emb_thd
# One kernel where Megatron-Core's functions are compiled, its own operations elsewhere.
_rotate = jit_fuser(rope_utils._apply_rotary_pos_emb_bshd)


class PackRotary(RotaryEmbedding):
    """Megatron-Core's rotary embedding, which takes the positions of a pack where its maker told them.

    The angles are those of Megatron-Core's table, bit for bit: [S, 1, 1, D] fp32, one row per position of the pack.
    """

    inv_freq: Tensor

    @classmethod
    def take_over(cls, rotary: RotaryEmbedding) -> None:
        """Turn ``rotary`` into one of these, with its settings."""
        assert type(rotary) is RotaryEmbedding, type(rotary)
        rotary.__class__ = cls

    def get_rotary_seq_len(self, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        """Return what :meth:`forward` takes: the positions of the pack, or as Megatron-Core the longest length."""
        if packed_seq_params is None and len(args) > 4:
            packed_seq_params, args = args[4], args[:4]
        positions = segment_positions(packed_seq_params)
        if positions is not None:
            return positions
        return super().get_rotary_seq_len(*args, packed_seq_params, **kwargs)

    def forward(self, positions: Tensor | int, *args: Any, **kwargs: Any) -> Tensor:
        """Return [S, 1, 1, D] angles of ``positions`` [S], or Megatron-Core's table for a length."""
        if not isinstance(positions, Tensor):
            return super().forward(positions, *args, **kwargs)
        if self.inv_freq.device != positions.device:
            self.inv_freq = self.inv_freq.to(positions.device)
        at = positions.to(self.inv_freq.dtype)
        if self.seq_len_interpolation_factor is not None:
            at = at * (1 / self.seq_len_interpolation_factor)
        freqs_SF = torch.outer(at, self.inv_freq)
        return torch.cat((freqs_SF, freqs_SF), dim=-1)[:, None, None, :]


def _apply_thd(t_TND: Tensor, cu_seqlens: Tensor, freqs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Turn [T, N, D] queries or keys of a pack.

    As many angles as positions: each has its own, whether the pack is one segment or many, and the lengths do not
    matter. (A context-parallel rank has part of the positions, of all of which Megatron-Core then gets the angles.)
    """
    if freqs.size(0) != t_TND.size(0):
        return cast(Tensor, _plain_thd(t_TND, cu_seqlens, freqs, *args, **kwargs))
    kwargs.pop("cp_group", None)
    return cast(Tensor, _rotate(t_TND.unsqueeze(1), freqs, *args, **kwargs)).squeeze(1)


rope_utils._apply_rotary_pos_emb_thd = _apply_thd
