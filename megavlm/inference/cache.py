"""Keys and values, or states, that generation keeps: each new token costs one position, not the whole prompt.

While :func:`caching` is on, the core attention of every language layer is a :class:`CachedAttention`, which also turns
queries and keys by the positions that the current :class:`CacheWindow` gives; the layers themselves, tensor and
sequence parallelism and the pipeline schedule are as in training. A prompt is read as a segment of a pack (a window
that fills the cache); then each window has one position per answer.

Shape legend: T positions of a turn, R rows of the cache (one per prompt), L positions of a row, N query heads and G
key/value heads of this tensor-parallel rank, D width of a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn

from megavlm.inference.quick import quick_layers
from megavlm.layers.cross import PictureLayer, attend, last_sights
from megavlm.layers.cross_beside import FeatureLayer
from megavlm.layers.mamba import MambaMixer
from megavlm.layers.segments import to_device
from megavlm.models.build import unwrap
from megavlm.parallel.engine import without_fp8


@dataclass
class CacheWindow:
    """Which positions a micro-batch of generation has."""

    rows: range
    """Rows of the cache that it belongs to, in the order of its segments."""
    lengths: list[int]
    """Positions of each row in this turn: those of the prompt, or 1."""
    starts: list[int]
    """Positions that each row has in the cache already: 0 for a prompt that is read."""
    reads_prompts: bool
    """Whether it fills empty rows."""
    ends: Tensor
    """[K] int64 positions of the turn whose logits are wanted."""
    freqs: Tensor
    """[T, 1, 1, D] fp32 rotary angles of its positions; fewer than D where a part of each head is turned."""
    query_scale: Tensor | None = None
    """[T] fp32 factor on the queries (logn attention), or None for 1."""
    interleaved: bool = False
    """Whether neighbouring channels are a pair, instead of those half a head apart."""
    _angles: dict[int | None, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _places: dict[int | None, tuple[Any, Any, slice, Tensor | None]] = field(default_factory=dict)

    def rotate(self, query_TND: Tensor, key_TGD: Tensor, part: int | None = None) -> tuple[Tensor, Tensor]:
        """Turn queries and keys by the rotary angles, as Megatron-Core's unfused ``apply_rotary_pos_emb`` does.

        Cosine and sine are taken once for all layers.

        Args:
            query_TND: queries.
            key_TGD: keys.
            part: which of two tables ``freqs`` has side by side; None where it is one.
        """
        if part not in self._angles:
            freqs_T1D = self.freqs[:, 0] if part is None else self.freqs[:, 0].chunk(2, dim=-1)[part]
            sin, half = freqs_T1D.sin(), freqs_T1D.size(-1) // 2
            if self.interleaved:
                signed = torch.stack((-sin[..., ::2], sin[..., 1::2]), dim=-1).flatten(-2)
            else:
                signed = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
            self._angles[part] = freqs_T1D.cos().to(query_TND.dtype), signed.to(query_TND.dtype)
        cos, sin = self._angles[part]
        width = cos.size(-1)
        half = width // 2
        whole = torch.cat((query_TND, key_TGD), dim=1)
        both = whole[..., :width]  # of some models only a part of a head is turned
        other = both.unflatten(-1, (half, 2)).flip(-1).flatten(-2) if self.interleaved else both.roll(half, dims=-1)
        turned = (both * cos).add_(other.mul_(sin))
        if width < whole.size(-1):
            turned = torch.cat((turned, whole[..., width:]), dim=-1)
        query_TND, key_TGD = turned.split((query_TND.size(1), key_TGD.size(1)), dim=1)
        return query_TND, key_TGD

    def places(self, device: torch.device, window: int | None = None) -> tuple[Any, Any, slice, Tensor | None]:
        """Return where new keys belong (indices of rows, of positions), which positions are attended to, and the mask.

        The mask is [R, 1, 1, L] of those positions that rows have. All is made once for all layers of a window. Rows of
        one length need slices only and no mask, which is quicker.

        Args:
            device: of the cache.
            window: positions that a layer attends to, its own among them; None for all.
        """
        if window not in self._places:
            rows, longest = slice(self.rows.start, self.rows.stop), max(self.starts) + 1
            shortest = min(self.starts) + 1
            seen = slice(0 if window is None else max(shortest - window, 0), longest)
            if shortest == longest:
                self._places[window] = rows, longest - 1, seen, None
            else:
                starts = torch.tensor(self.starts, device=device)
                at = torch.arange(seen.start, seen.stop, device=device)
                mask = at <= starts[:, None]
                if window is not None:
                    mask &= at > starts[:, None] - window
                rows_there = torch.arange(rows.start, rows.stop, device=device)
                self._places[window] = rows_there, starts, seen, mask[:, None, None]
        return self._places[window]


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
    turn: CacheWindow | None = None
    _layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _pictures: dict[int, list[tuple[Tensor, Tensor] | None]] = field(default_factory=dict)
    _states: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)

    def states(self, name: int, shapes: Sequence[tuple[int, ...]], like: Tensor) -> tuple[Tensor, ...]:
        """Return what a layer without attention goes on from, [R, ..] each; zeros when they are first asked for.

        The last one is in fp32, the others are in the number type of ``like``.
        """
        if name not in self._states:
            types = [like.dtype] * (len(shapes) - 1) + [torch.float32]
            self._states[name] = tuple(
                like.new_zeros((self.rows, *shape), dtype=dtype) for shape, dtype in zip(shapes, types, strict=True)
            )
        return self._states[name]

    def pictures(self, name: int) -> list[tuple[Tensor, Tensor] | None]:
        """Return keys and values [F, G, D] of the pictures that each row goes on seeing in a layer; None for none."""
        return self._pictures.setdefault(name, [None] * self.rows)

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
        for name, kept in self._pictures.items():
            self._pictures[name] = [kept[row] for row in rows]
        for name, states in self._states.items():
            index = torch.tensor(rows, device=states[0].device)
            self._states[name] = tuple(one.index_select(0, index) for one in states)
        self.rows = len(rows)


class CachedAttention(nn.Module):
    """Stands where a layer's core attention stands, and remembers keys and values.

    Args:
        core: the layer's own core attention, which reads prompts.
        cache: where to keep them.
        scale: of the softmax; None for 1 / sqrt(D).
        window: positions that are attended to, its own among them; None for all.
        rotary_part: which of two rotary tables turns queries and keys; None where there is one.
    """

    def __init__(
        self, core: Any, cache: KeyValueCache, scale: float | None, window: int | None = None,
        rotary_part: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._core = [core]  # not a submodule: its parameters and states stay the layer's
        self.cache, self.scale, self.window, self.rotary_part = cache, scale, window, rotary_part

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        """Attend; ``query`` is [T, N, D], ``key`` and ``value`` are [T, G, D].

        Returns:
            [T, N, D], or what the layer's own core attention makes of it.
        """
        turn = self.cache.turn
        assert turn is not None
        query, key = turn.rotate(query, key, self.rotary_part)
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
        self, query_TND: Tensor, key_TGD: Tensor, value_TGD: Tensor, turn: CacheWindow, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Attend from one new position per row to all that the row has; positions behind the rows get zeros."""
        count = len(turn.rows)
        if not count:
            return torch.zeros_like(query_TND)
        at_rows, at_positions, seen, mask = turn.places(keys.device, self.window)
        keys[at_rows, :, at_positions] = key_TGD[:count]
        values[at_rows, :, at_positions] = value_TGD[:count]
        rows = slice(turn.rows.start, turn.rows.stop)
        attended = F.scaled_dot_product_attention(
            query_TND[:count].unsqueeze(2),
            keys[rows, :, seen],
            values[rows, :, seen],
            attn_mask=mask,
            scale=self.scale,
            enable_gqa=query_TND.size(1) != key_TGD.size(1),
        ).squeeze(2)
        padding = query_TND.size(0) - count
        return torch.cat((attended, query_TND.new_zeros(padding, *attended.shape[1:]))) if padding else attended


class CachedPictures:
    """What a layer that attends to pictures remembers of prompts (:class:`megavlm.layers.cross.KeptPictures`).

    Args:
        cache: where to keep it.
        scale: of the softmax; None for 1 / sqrt(D).
    """

    def __init__(self, cache: KeyValueCache, scale: float | None) -> None:
        self.cache, self.scale = cache, scale

    @property
    def _turn(self) -> CacheWindow:
        assert self.cache.turn is not None
        return self.cache.turn

    @property
    def goes_on(self) -> bool:
        """Whether answers go on, and no prompt is read."""
        return not self._turn.reads_prompts

    def attend(self, query_SND: Tensor) -> Tensor | None:
        """Return what one new position per row sees."""
        if not self.goes_on:
            return None
        kept, found = self.cache.pictures(id(self)), torch.zeros_like(query_SND)
        for place, row in enumerate(self._turn.rows):
            if (own := kept[row]) is not None:
                found[place : place + 1] = attend(query_SND[place : place + 1], *own, self.scale)
        return found

    def remember(self, key_FGD: Tensor, value_FGD: Tensor, packed: PackedSeqParams) -> None:
        """Keep what the end of each prompt sees."""
        kept = self.cache.pictures(id(self))
        for row, seen in zip(self._turn.rows, last_sights(packed), strict=False):  # the last segment may be padding
            kept[row] = None if seen is None else (key_FGD[slice(*seen)].clone(), value_FGD[slice(*seen)].clone())

    def seen(self, length: int, device: torch.device) -> Tensor:
        """Return [S, 1, 1] bool."""
        kept = self.cache.pictures(id(self))
        mask = [kept[row] is not None for row in self._turn.rows]
        return to_device(torch.tensor(mask + [False] * (length - len(mask))), device)[:, None, None]


class CachedStates:
    """What a Mamba layer remembers of prompts and answers (:class:`megavlm.layers.mamba.KeptStates`)."""

    def __init__(self, cache: KeyValueCache) -> None:
        self.cache = cache

    @property
    def _turn(self) -> CacheWindow:
        assert self.cache.turn is not None
        return self.cache.turn

    @property
    def goes_on(self) -> bool:
        """Whether answers go on, and no prompt is read."""
        return not self._turn.reads_prompts

    @property
    def rows(self) -> range:
        """The turn's rows."""
        return self._turn.rows

    def states(self, shapes: Sequence[tuple[int, ...]], like: Tensor) -> tuple[Tensor, ...]:
        """Return what is kept of all rows."""
        return self.cache.states(id(self), shapes, like)


def _configs(chunks: Sequence[Any]) -> list[Any]:
    """Return the configuration of every module of ``chunks`` that has one: tower, connector, layers."""
    modules = (module for chunk in chunks for module in chunk.modules())
    return [module.config for module in modules if hasattr(getattr(module, "config", None), "fp8")]


@contextlib.contextmanager
def caching(chunks: Sequence[Any], cache: KeyValueCache) -> Iterator[None]:
    """Let the language layers of ``chunks`` use ``cache``, and leave them as they were. For evaluation mode.

    The last stage gives logits [1, K, V / TP] of the turn's ``ends`` only.

    Args:
        chunks: the model chunks of this rank, wrapped or bare.
        cache: whose ``turn`` is set before each forward pass.
    """
    models = [unwrap(chunk).language for chunk in chunks]
    layers = [layer for model in models for layer in model.decoder.layers]
    crossed = [layer.cross_attention for layer in layers if isinstance(layer, PictureLayer | FeatureLayer)]
    mixers = [layer.self_attention for layer in layers if not isinstance(layer, PictureLayer)]
    recurrent = [mixer for mixer in mixers if isinstance(mixer, MambaMixer)]
    attentions = [mixer for mixer in mixers if not isinstance(mixer, MambaMixer)]
    cores = [attention.core_attention for attention in attentions]
    hooks = []
    try:
        for attention, core in zip(attentions, cores, strict=True):
            # The configuration's: not every core attention keeps it.
            scale, window = attention.config.softmax_scale, getattr(attention, "sliding_window", None)
            part = getattr(attention, "rotary_part", None)
            attention.core_attention = CachedAttention(core, cache, scale, window, part)
        for one in crossed:
            one.kept = CachedPictures(cache, one.config.softmax_scale)
        for one in recurrent:
            one.kept = CachedStates(cache)
        # No angles for queries and none for keys: the layers leave them as they are.
        rotaries = [model.rotary_pos_emb for model in models if hasattr(model, "rotary_pos_emb")]
        hooks += [rotary.register_forward_hook(lambda *_: (None, None)) for rotary in rotaries]
        with without_fp8(_configs(chunks)), quick_layers(chunks, lambda: cast(CacheWindow, cache.turn).ends):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for one in (*crossed, *recurrent):
            one.kept = None
        for attention, core in zip(attentions, cores, strict=True):
            attention.core_attention = core
