"""Keys and values that generation keeps, so that each new token costs one position instead of the whole prompt.

While :func:`caching` is on, the core attention of every language layer is a :class:`CachedAttention`, which also turns
queries and keys by the positions that the current :class:`Turn` gives; the layers themselves, tensor and sequence
parallelism and the pipeline schedule are as in training. A prompt is read as a segment of a pack (a turn that fills the
cache); then each turn has one position per answer.

Shape legend: T positions of a turn, R rows of the cache (one per prompt), L positions of a row, N query heads and G
key/value heads of this tensor-parallel rank, D width of a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavlm.models.build import unwrap


@dataclass
class Turn:
    """Which positions a micro-batch of generation has."""

    rows: range
    """Rows of the cache that it belongs to, in the order of its segments."""
    lengths: list[int]
    """Positions of each row in this turn: those of the prompt, or 1."""
    starts: list[int]
    """Positions that each row has in the cache already: 0 for a prompt that is read."""
    reads_prompts: bool
    """Whether it fills empty rows."""
    freqs: Tensor
    """[T, 1, 1, D] fp32 rotary angles of its positions."""
    query_scale: Tensor | None = None
    """[T] fp32 factor on the queries (logn attention), or None for 1."""
    _turned: tuple[Tensor, Tensor] | None = None

    def rotate(self, values_TND: Tensor) -> Tensor:
        """Turn queries or keys by the rotary angles, as Megatron-Core's unfused ``apply_rotary_pos_emb`` does.

        Cosine and sine are taken once for all layers.
        """
        if self._turned is None:
            freqs_T1D = self.freqs[:, 0]
            self._turned = freqs_T1D.cos().to(values_TND.dtype), freqs_T1D.sin().to(values_TND.dtype)
        cos, sin = self._turned
        first, second = values_TND.chunk(2, dim=-1)
        return values_TND * cos + torch.cat((-second, first), dim=-1) * sin


@dataclass
class KeyValueCache:
    """Keys and values of all layers of this rank.

    Attributes:
        rows: prompts.
        length: positions of each.
        turn: the micro-batch that is being computed.
    """

    rows: int
    length: int
    turn: Turn | None = None
    _layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def layer(self, name: int, like_TGD: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [R, G, L, D] of a layer, made when they are first asked for."""
        if name not in self._layers:
            shape = (self.rows, like_TGD.size(-2), self.length, like_TGD.size(-1))
            # Zeros: what is masked has weight 0, but 0 times garbage may be NaN.
            self._layers[name] = (like_TGD.new_zeros(shape), like_TGD.new_zeros(shape))
        return self._layers[name]

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order, and forget the others."""
        for name, (keys, values) in self._layers.items():
            index = torch.tensor(rows, device=keys.device)
            self._layers[name] = (keys.index_select(0, index), values.index_select(0, index))
        self.rows = len(rows)


class CachedAttention(nn.Module):
    """Stands where a layer's core attention stands, and remembers keys and values.

    Args:
        core: the layer's own core attention, which reads prompts.
        cache: where to keep them.
        scale: of the softmax; None for 1 / sqrt(D).
    """

    def __init__(self, core: Any, cache: KeyValueCache, scale: float | None) -> None:
        super().__init__()
        self._core = [core]  # not a submodule: its parameters and states stay the layer's
        self.cache, self.scale = cache, scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        """Attend; ``query`` is [T, N, D], ``key`` and ``value`` are [T, G, D].

        Returns:
            [T, N, D], or what the layer's own core attention makes of it.
        """
        turn = self.cache.turn
        assert turn is not None
        query, key = turn.rotate(query), turn.rotate(key)
        keys_RGLD, values_RGLD = self.cache.layer(id(self), key)
        if turn.query_scale is not None:
            query = query * turn.query_scale.to(query.dtype)[:, None, None]
        if turn.reads_prompts:
            at = 0
            for row, length in zip(turn.rows, turn.lengths, strict=True):
                keys_RGLD[row, :, :length] = key[at : at + length].transpose(0, 1)
                values_RGLD[row, :, :length] = value[at : at + length].transpose(0, 1)
                at += length
            return self._core[0](query, key, value, *rest, **options)
        return self._next(query, key, value, turn, keys_RGLD, values_RGLD)

    def _next(
        self, query_TND: Tensor, key_TGD: Tensor, value_TGD: Tensor, turn: Turn, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Attend from one new position per row to all that the row has; positions behind the rows get zeros."""
        count = len(turn.rows)
        result = torch.zeros_like(query_TND)
        if not count:
            return result
        rows = slice(turn.rows.start, turn.rows.stop)
        starts = torch.tensor(turn.starts, device=keys.device)
        index = torch.arange(turn.rows.start, turn.rows.stop, device=keys.device)
        keys[index, :, starts] = key_TGD[:count]
        values[index, :, starts] = value_TGD[:count]
        longest = max(turn.starts) + 1
        mask = None
        if min(turn.starts) + 1 < longest:
            mask = (torch.arange(longest, device=keys.device) <= starts[:, None])[:, None, None]
        attended = F.scaled_dot_product_attention(
            query_TND[:count].unsqueeze(2),
            keys[rows, :, :longest],
            values[rows, :, :longest],
            attn_mask=mask,
            scale=self.scale,
            enable_gqa=query_TND.size(1) != key_TGD.size(1),
        )
        result[:count] = attended.squeeze(2)
        return result


@contextlib.contextmanager
def caching(chunks: Sequence[Any], cache: KeyValueCache) -> Iterator[None]:
    """Let the language layers of ``chunks`` use ``cache`` in evaluation mode, and leave them as they were.

    Args:
        chunks: the model chunks of this rank, wrapped or bare.
        cache: whose ``turn`` is set before each forward pass.
    """
    models = [unwrap(chunk).language for chunk in chunks]
    attentions = [layer.self_attention for model in models for layer in model.decoder.layers]
    cores = [attention.core_attention for attention in attentions]
    trained = [chunk.training for chunk in chunks]
    hooks = []
    try:
        for attention, core in zip(attentions, cores, strict=True):
            attention.core_attention = CachedAttention(core, cache, getattr(core, "softmax_scale", None))
        # No angles for queries and none for keys: the layers leave them as they are.
        hooks += [model.rotary_pos_emb.register_forward_hook(lambda *_: (None, None)) for model in models]
        for chunk in chunks:
            chunk.eval()
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for attention, core in zip(attentions, cores, strict=True):
            attention.core_attention = core
        for chunk, was in zip(chunks, trained, strict=True):
            chunk.train(was)
