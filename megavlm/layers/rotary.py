"""Rotary positions of a pack: every token's angle is looked up once per micro-batch, and no layer asks for lengths.

Megatron-Core's unfused form for packs reads the segment lengths back from the device in every layer, for queries and
for keys, and gathers the same angles each time. Here the model hands the layers one angle per position of the pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from megatron.core.jit import jit_fuser
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from megavlm.layers.segments import segment_positions
from megavlm.parallel.megatron_versions import rotary_options

_plain_thd = rope_utils._apply_rotary_pos_emb_thd
# One kernel where Megatron-Core's functions are compiled, its own operations elsewhere.
_rotate = jit_fuser(rope_utils._apply_rotary_pos_emb_bshd)


class _Turned(torch.autograd.Function):
    """Megatron-Core's unfused rotation of halves on a CPU, bit for bit.

    Autograd pads and joins halves once more on the way back, a copy each.
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[..., D] to [..., D]; ``cos`` and ``sin`` are [..., D]."""
        ctx.save_for_backward(cos, sin)
        first, second = sin.chunk(2, dim=-1)
        return _both_ways(t, cos, torch.cat((-first, second), dim=-1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of ``t``."""
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, dim=-1)
        return _both_ways(grad, cos, torch.cat((second, -first), dim=-1)), None, None


def _both_ways(t: Tensor, straight: Tensor, crosswise: Tensor) -> Tensor:
    first, second = t.chunk(2, dim=-1)
    return (t * straight).add_(torch.cat((second, first), dim=-1).mul_(crosswise))


def _turned(
    t: Tensor,
    freqs: Tensor,
    rotary_interleaved: bool = False,
    multi_latent_attention: bool = False,
    mscale: float = 1.0,
) -> Tensor:
    """Turn ``t`` [..., D] by ``freqs`` [..., R], R <= D, as Megatron-Core's ``_apply_rotary_pos_emb_bshd`` does."""
    # Angles may learn, as those of RICE's class token do.
    plain = t.size(-1) == freqs.size(-1) and not freqs.requires_grad and not rotary_interleaved
    if t.device.type != "cpu" or multi_latent_attention or not plain:
        return cast(Tensor, _rotate(t, freqs, rotary_interleaved, multi_latent_attention, mscale))
    cos, sin = ((one * mscale).to(t.dtype) for one in (torch.cos(freqs), torch.sin(freqs)))
    return cast(Tensor, _Turned.apply(t, cos, sin))


class PackRotary(RotaryEmbedding):
    """Megatron-Core's rotary embedding, which takes the positions of a pack where its maker told them.

    The angles are those of Megatron-Core's table, bit for bit: [S, 1, 1, D] fp32, one row per position of the pack.
    Of M-RoPE (Qwen2-VL, arXiv 2409.12191) a position is three numbers, and each pair of channels goes by one of them;
    Megatron-Core's own ``MultimodalRotaryEmbedding`` has no interleaved sections, and asks for a batch without packs.
    """

    inv_freq: Tensor
    pair_axes: Tensor | None

    @classmethod
    def take_over(cls, rotary: RotaryEmbedding, axes: Sequence[int] | None = None) -> None:
        """Turn ``rotary`` into one of these, with its settings.

        Args:
            rotary: what Megatron-Core has built.
            axes: of each pair of channels, by which number of a position it is turned; None where there is one.
        """
        assert type(rotary) is RotaryEmbedding, type(rotary)
        rotary.__class__ = cls
        assert axes is None or len(axes) == rotary.inv_freq.numel(), (axes, rotary.inv_freq.shape)
        cast(PackRotary, rotary).pair_axes = None if axes is None else torch.tensor(axes)

    def get_rotary_seq_len(self, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        """Return what :meth:`forward` takes: the positions of the pack, or as Megatron-Core the longest length."""
        if packed_seq_params is None and len(args) > 4:
            packed_seq_params, args = args[4], args[:4]
        positions = segment_positions(packed_seq_params)
        if positions is not None:
            return positions
        return super().get_rotary_seq_len(*args, packed_seq_params, **kwargs)

    def forward(self, positions: Tensor | int, *args: Any, **kwargs: Any) -> Tensor:
        """Return [S, 1, 1, D] angles of ``positions`` [S] or [3, S], or Megatron-Core's table for a length.

        Raises:
            AssertionError: positions have three numbers and the model knows one, or the other way round.
        """
        if not isinstance(positions, Tensor):
            return super().forward(positions, *args, **kwargs)
        assert (positions.dim() == 2) == (self.pair_axes is not None), f"positions {list(positions.shape)}"
        if self.inv_freq.device != positions.device:
            self.inv_freq = self.inv_freq.to(positions.device)
        at = positions.to(self.inv_freq.dtype)
        if self.seq_len_interpolation_factor is not None:
            at = at * (1 / self.seq_len_interpolation_factor)
        if self.pair_axes is None:
            freqs_SF = torch.outer(at, self.inv_freq)
        else:
            if self.pair_axes.device != at.device:
                self.pair_axes = self.pair_axes.to(at.device)
            freqs_SF = at.t()[:, self.pair_axes] * self.inv_freq
        if self.rotary_interleaved:
            return freqs_SF.repeat_interleave(2, dim=-1)[:, None, None, :]
        return torch.cat((freqs_SF, freqs_SF), dim=-1)[:, None, None, :]


class TwoRotaries(PackRotary):
    """Two tables side by side, [S, 1, 1, 2 D]: the model's own, and one of another base that is not stretched.

    The layers of Gemma 3 (arXiv 2503.19786, section 2) with a window turn heads by the second; each takes its part
    (:class:`megavlm.layers.attention.CompactSelfAttention`).
    """

    local_inv_freq: Tensor

    @classmethod
    def begin(cls, rotary: RotaryEmbedding, base: int) -> None:
        """Turn ``rotary`` into one of these, whose second table has this base."""
        cls.take_over(rotary)
        width = 2 * rotary.inv_freq.numel()
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device=rotary.inv_freq.device) / width
        cast(TwoRotaries, rotary).local_inv_freq = 1.0 / (base**exponents)

    def forward(self, positions: Tensor | int, *args: Any, **kwargs: Any) -> Tensor:
        """Return both tables' angles of ``positions`` [S], or of so many from 0."""
        own = super().forward(positions, *args, **kwargs)
        # For a length Megatron-Core asks get_emb, which has both.
        return self._with_local(own, positions) if isinstance(positions, Tensor) else own

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Return both tables' angles of positions from ``offset``."""
        own = super().get_emb(max_seq_len, offset)
        return self._with_local(own, torch.arange(max_seq_len, device=own.device) + offset)

    def _with_local(self, own_S11D: Tensor, positions_S: Tensor) -> Tensor:
        if self.local_inv_freq.device != positions_S.device:
            self.local_inv_freq = self.local_inv_freq.to(positions_S.device)
        freqs_SF = torch.outer(positions_S.to(self.local_inv_freq.dtype), self.local_inv_freq)
        return torch.cat((own_S11D, torch.cat((freqs_SF, freqs_SF), dim=-1)[:, None, None, :]), dim=-1)


def pair_axes(sections: Sequence[int], *, interleaved: bool) -> list[int] | None:
    """Return by which number of a position (0 time, 1 row, 2 column) each pair of channels is turned.

    Args:
        sections: how many pairs each has; empty for positions of one number.
        interleaved: they take turns, row and column at 3 i + 1 and 3 i + 2 while they have some (Qwen3-VL), instead of
            standing one after the other (Qwen2-VL).

    Returns:
        As many as the sum of ``sections``; None where these are empty.
    """
    if not sections:
        return None
    if not interleaved:
        return [axis for axis, count in enumerate(sections) for _ in range(count)]
    return [i % 3 if i < 3 * sections[i % 3] else 0 for i in range(sum(sections))]


def _apply_thd(t_TND: Tensor, cu_seqlens: Tensor, freqs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Turn [T, N, D] queries or keys of a pack.

    As many angles as positions: each has its own, whether the pack is one segment or many, and the lengths do not
    matter. (A context-parallel rank has part of the positions, of all of which Megatron-Core then gets the angles.)
    """
    if freqs.size(0) != t_TND.size(0):
        return cast(Tensor, _plain_thd(t_TND, cu_seqlens, freqs, *args, **kwargs))
    kwargs.pop("cp_group", None)
    return _turned(t_TND.unsqueeze(1), freqs, *args, **rotary_options(kwargs)).squeeze(1)


rope_utils._apply_rotary_pos_emb_thd = _apply_thd
