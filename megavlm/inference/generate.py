"""Generation at any layout, with a key/value cache, on Megatron-Core's forward-only pipeline schedule.

Prompts are packed without padding and read once. Then every forward pass has one position per unfinished answer; with a
pipeline they are shared out among as many micro-batches as it has stages. Image features are computed once.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from numpy.typing import NDArray
from torch import Tensor

from megavlm.config.encoder import check_answers
from megavlm.config.errors import UserError
from megavlm.data.batch import make_pack
from megavlm.data.device_batch import Batch, arrangement_on, make_batch
from megavlm.data.positions import OwnPositions
from megavlm.data.spans import TwoWaySpans
from megavlm.inference.cache import CacheWindow, KeyValueCache, caching
from megavlm.inference.choice import choose, log_probabilities
from megavlm.inference.packs import first_fit, pack_segments
from megavlm.inference.positions import Positions
from megavlm.inference.prompt import Prompt
from megavlm.inference.sampling import NO_TOKEN, Sampling
from megavlm.models.build import unwrap
from megavlm.models.codes import saying_pictures
from megavlm.models.vlm import VisionLanguageModel
from megavlm.parallel import pipeline
from megavlm.parallel.device import local_device
from megavlm.parallel.state import from_first_replica, is_first_stage, is_reader

logger = logging.getLogger(__name__)

_IMAGES_AT_ONCE = 16
_CACHED_POSITIONS = 65536


@dataclass(frozen=True)
class Chosen:
    """A token of an answer."""

    token: int
    """Its id, or :data:`NO_TOKEN`: the model's logits are not finite, and the answer has ended."""
    log_probability: float | None = None
    """Natural logarithm, where the prompt's ``Sampling.report`` asks for it."""
    best: tuple[tuple[int, float], ...] = ()
    """The best tokens with theirs, as many as ``Sampling.report`` says."""


def generate(
    chunks: Sequence[Any],
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    vocab_size: int,
    pack_length: int,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    cached_positions: int = _CACHED_POSITIONS,
) -> list[list[int]]:
    """Answer ``prompts``; a collective over the ranks of one data-parallel replica.

    Where replicas share experts it is one over all of them, and all are given the same prompts.

    Args:
        chunks: the model chunks of this rank, wrapped or bare.
        prompts: the same on all ranks of the replica, but for their images.
        max_new_tokens: longest answer.
        stop_ids: tokens that end an answer.
        vocab_size: ids from here on (padding of the embedding) are never chosen.
        pack_length: most positions of one micro-batch of prompts; a prompt with its answer may be as long.
        sampling: how tokens are chosen.
        cached_positions: prompts are answered in groups that need no more positions of cache than this (or one prompt
            at a time). A position takes 2 x layers x key/value heads x head width numbers, shared out over TP and PP.

    Returns:
        Token ids of each answer, without the token that ended it, on all ranks. An answer also ends where the model's
        logits are not finite, which is logged.

    Raises:
        UserError: a prompt and its longest answer do not fit ``pack_length``, or the model does not answer.
    """
    broken = 0
    for tokens in generating(
        chunks, prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids, vocab_size=vocab_size,
        pack_length=pack_length, sampling=sampling, cached_positions=cached_positions,
    ):  # fmt: skip
        broken += sum(one.token == NO_TOKEN for one in tokens.values())
    if broken and is_reader():
        logger.warning("%d of %d answers end early: the model's logits are not finite", broken, len(prompts))
    return [prompt.answer for prompt in prompts]


@torch.no_grad()
def generating(
    chunks: Sequence[Any],
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int | Sequence[int],
    stop_ids: Sequence[int],
    vocab_size: int,
    pack_length: int,
    sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008 - frozen
    cached_positions: int = _CACHED_POSITIONS,
    dropped: Callable[[], Collection[int]] = frozenset,
) -> Iterator[dict[int, Chosen]]:
    """Answer ``prompts`` as :func:`generate` does, and yield as tokens come.

    Here ``max_new_tokens`` and ``sampling`` may also be given for each prompt; one with a sampling of its own draws
    from that one's seed. ``dropped`` is asked after each token, on all ranks with the same result, which prompts (as
    indices) need no further tokens.

    Yields:
        The new token of each prompt that got one, by the prompt's index; a token that ends an answer is among them.
        It has been appended to the prompt's ``answer`` unless it ends it, as :data:`NO_TOKEN` does too.

    Raises:
        UserError: as :func:`generate`.
    """
    check_answers(unwrap(chunks[0]).settings)
    most = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    lengths = [len(prompt) + new for prompt, new in zip(prompts, most, strict=True)]
    longest = max(lengths, default=0)
    if longest > pack_length:
        raise UserError(f"a prompt with its answer takes {longest} positions, a pack has {pack_length}")
    asked = [i for i in range(len(prompts)) if most[i] > 0]
    for group in _by_cache(asked, lengths, cached_positions):
        own = [(sampling, i) if isinstance(sampling, Sampling) else (sampling[i], 0) for i in group]
        run = _Run(chunks, [prompts[i] for i in group], own, [most[i] for i in group], vocab_size, pack_length)
        said = {one.only is not None for one, _ in own}
        assert len(said) == 1, "some say pictures, some do not"
        with pipeline.evaluating(chunks), caching(chunks, run.cache), saying_pictures(chunks, said.pop()):
            places = {i: place for place, i in enumerate(group)}

            def gone(places: dict[int, int] = places) -> set[int]:
                return {places[i] for i in dropped() if i in places}

            for tokens in run.turns(frozenset((*stop_ids, NO_TOKEN)), gone):
                yield {group[i]: token for i, token in tokens.items()}


def _by_cache(indices: Sequence[int], lengths: Sequence[int], positions: int) -> list[list[int]]:
    """Split prompts into groups that fit the cache, whose rows are all as long as the longest of the group."""
    groups: list[list[int]] = []
    for i in sorted(indices, key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= positions:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


@dataclass
class _Request:
    """One micro-batch of generation."""

    batch: Batch
    turn: CacheWindow
    members: list[int]
    """The answers that get a token, as indices into the run's prompts."""
    features: Tensor | None = None


class _Run:
    """The answers to some prompts that share a cache.

    Args:
        chunks: the model chunks of this rank.
        prompts: to answer, longest first.
        sampling: how tokens are chosen for each, and what is added to its seed.
        max_new_tokens: longest answer of each; at least 1.
        vocab_size: ids from here on are never chosen.
        pack_length: most positions of one micro-batch of prompts.
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        prompts: Sequence[Prompt],
        sampling: Sequence[tuple[Sampling, int]],
        max_new_tokens: Sequence[int],
        vocab_size: int,
        pack_length: int,
    ) -> None:
        self.chunks, self.prompts, self.sampling = chunks, prompts, [one for one, _ in sampling]
        self.max_new_tokens, self.vocab_size, self.pack_length = max_new_tokens, vocab_size, pack_length
        self.bare = unwrap(chunks[0])
        self.generators = [one.generator(index) for one, index in sampling]
        self.report = max((one.report for one in self.sampling if one.report is not None), default=None)
        longest = max(len(prompt) + new for prompt, new in zip(prompts, max_new_tokens, strict=True))
        self.cache = KeyValueCache(len(prompts), longest)
        # Where layers of later stages attend to pictures, these need to know how large they are.
        self.grids = pipeline.from_first_stage([_grid(one) for one in prompts]) if self.bare.crosses else None
        settings, self.own = self.bare.settings.language, self.bare.own_positions
        self.positions = Positions(
            self.bare.language,
            longest,
            [len(prompt.tokens) for prompt in prompts],
            ntk_length=settings.ntk_length,
            logn_length=settings.logn_length,
            own=None if self.own is None else [one.positions(self.own, longest - len(one.tokens)) for one in prompts],
        )
        config = self.bare.config
        self.stages = config.pipeline_model_parallel_size
        self.virtual = config.virtual_pipeline_model_parallel_size is not None
        self.multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1

    def turns(self, stop_ids: frozenset[int], dropped: Callable[[], Collection[int]]) -> Iterator[dict[int, Chosen]]:
        """Read the prompts, then add token by token; yields the new token of each unfinished answer."""
        groups = first_fit([len(prompt) for prompt in self.prompts], self.pack_length)
        active = [i for group in groups for i in group]  # in the order of the cache's rows
        features = self._features() if is_first_stage() else []
        length = self._rounded(max(sum(len(self.prompts[i]) for i in group) for group in groups))
        row, requests = 0, []
        for group in self._padded(groups):
            shown = [item for i in group if features and (item := features[i]) is not None]
            requests.append(self._reading(group, row, length, torch.cat(shown) if shown else None))
            row += len(group)
        tokens = self._forward(requests, length)
        rows = list(active)
        for count in itertools.count(1):
            for i in active:
                if tokens[i].token not in stop_ids:
                    self.prompts[i].answer.append(tokens[i].token)
            yield {i: tokens[i] for i in active}
            gone = dropped()
            active = [
                i
                for i in active
                if tokens[i].token not in stop_ids and count < self.max_new_tokens[i] and i not in gone
            ]
            if not active:
                return
            if 2 * len(active) <= len(rows):  # copying rows costs; so does carrying finished ones along
                self.cache.keep([rows.index(i) for i in active])
                rows = list(active)
            tokens = self._forward(*self._adding(rows, set(active)))

    def _features(self) -> list[Tensor | None]:
        """Return the image features of each prompt; those of prompts that share their images are made once."""
        made: dict[int, Tensor | None] = {}
        for prompt in self.prompts:
            if id(prompt.images) not in made:
                made[id(prompt.images)] = _features(self.bare, prompt)
        return [made[id(prompt.images)] for prompt in self.prompts]

    def _padded(self, groups: list[list[int]]) -> list[list[int]]:
        """Add empty groups where the interleaved schedule wants a multiple of the stages: a cache is read once."""
        return groups + [[]] * (-len(groups) % self.stages if self.virtual else 0)

    def _rounded(self, length: int) -> int:
        """Return the least number of positions from ``length`` on that sequence parallelism can share out."""
        return -(-length // self.multiple) * self.multiple

    def _reading(self, group: list[int], row: int, length: int, features: Tensor | None) -> _Request:
        """Return the micro-batch of ``length`` positions that reads ``group`` into the cache from ``row`` on."""
        prompts = [self.prompts[i] for i in group]
        lengths = [len(prompt) for prompt in prompts]
        batch = pack_prompts(prompts, length, self.own, self.bare.two_way_spans)
        freqs, scale = self.positions.of([(i, range(span)) for i, span in zip(group, lengths, strict=True)])
        turn = CacheWindow(
            range(row, row + len(group)), lengths, [0] * len(group), True,
            torch.from_numpy(np.cumsum(lengths, dtype=np.int64) - 1).to(local_device()),
            self.positions.padded(freqs, length),
            None if scale is None else self.positions.padded(scale, length),
            self.bare.config.rotary_interleaved,
        )  # fmt: skip
        if self.grids is not None:
            shown = [grid for i in group if (grid := self.grids[i]) is not None]
            batch.image_grid = torch.from_numpy(np.concatenate(shown)) if shown else None
        return _Request(batch, turn, group, features)

    def _adding(self, rows: list[int], active: set[int]) -> tuple[list[_Request], int]:
        """Return the micro-batches that add a token to each row, and their length; finished rows are carried along."""
        parts = min(self.stages, len(rows))
        bounds = [len(rows) * k // parts for k in range(parts + 1)]
        groups = self._padded([rows[a:b] for a, b in itertools.pairwise(bounds)])
        length = self._rounded(max(map(len, groups)))
        requests, row = [], 0
        for group in groups:
            requests.append(self._one_each(group, row, length, active))
            row += len(group)
        return requests, length

    def _one_each(self, group: list[int], row: int, length: int, active: set[int]) -> _Request:
        tokens = np.zeros(length, np.int64)
        starts = []
        for k, i in enumerate(group):
            prompt = self.prompts[i]
            tokens[k] = prompt.answer[-1] if prompt.answer else prompt.tokens[-1]
            starts.append(len(prompt) - 1)
        freqs, scale = self.positions.of([(i, range(s, s + 1)) for i, s in zip(group, starts, strict=True)])
        device = local_device()
        wanted = [k for k, i in enumerate(group) if i in active]
        turn = CacheWindow(
            range(row, row + len(group)), [1] * len(group), starts, False,
            torch.tensor(wanted, dtype=torch.int64, device=device),
            self.positions.padded(freqs, length),
            None if scale is None else self.positions.padded(scale, length),
            self.bare.config.rotary_interleaved,
        )  # fmt: skip
        pack = make_pack([tokens], length)
        places = np.pad(starts, (0, length - len(starts)))  # of the rows; behind them is padding
        # Angles are the window's (``freqs``); of the batch's own positions the layers make none.
        pack.position_ids = places if self.own is None else np.tile(places, (*self.own.lead, 1))
        return _Request(make_batch(pack, None, device), turn, [group[k] for k in wanted])

    def _forward(self, requests: list[_Request], length: int) -> dict[int, Chosen]:
        """Run micro-batches of ``length`` positions; returns the chosen token of each member, on all ranks."""
        picked = pipeline.run(self.chunks, requests, self._step, length)
        order = [i for request in requests for i in request.members]
        best = min(self.report or 0, self.vocab_size)
        tokens = torch.zeros(len(order), dtype=torch.int64, device=local_device())
        if self.report is not None:
            tokens = torch.zeros(len(order), 2 + 2 * best, dtype=torch.float64, device=local_device())
        if picked:  # the last stage
            tokens = torch.cat(picked)
        tokens = from_first_replica(pipeline.from_last_stage(tokens))
        if self.report is None:
            return {i: Chosen(token) for i, token in zip(order, tokens.tolist(), strict=True)}
        return {i: self._reported(i, row, best) for i, row in zip(order, tokens.tolist(), strict=True)}

    def _reported(self, index: int, row: list[float], best: int) -> Chosen:
        """Return what a row of :func:`log_probabilities` says, as far as the prompt asks for it."""
        wanted = self.sampling[index].report
        if wanted is None:
            return Chosen(int(row[0]))
        ids, values = row[2 : 2 + best], row[2 + best :]
        return Chosen(
            int(row[0]), row[1], tuple((int(i), value) for i, value in zip(ids, values, strict=True))[:wanted]
        )

    def _step(self, model: Any, request: _Request) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Run one chunk; the last one chooses tokens."""
        self.cache.turn = request.turn
        output = model(**request.batch.inputs(), image_features=request.features)
        return output, partial(self._pick, request)

    def _pick(self, request: _Request, logits_1KV: Tensor) -> Tensor:
        """Return the tokens [K] that come after the K positions of ``request.turn.ends``.

        With a report, they are what :func:`log_probabilities` makes of them.
        """
        logits = gather_from_tensor_model_parallel_region(logits_1KV[0])[:, : self.vocab_size]
        members = [self.prompts[i] for i in request.members]
        sampling = [self.sampling[i] for i in request.members]
        seen = [
            [*prompt.tokens.tolist(), *prompt.answer] if one.repetition_penalty != 1.0 else []
            for prompt, one in zip(members, sampling, strict=True)
        ]
        tokens = choose(logits, sampling, seen, [self.generators[i] for i in request.members])
        return tokens if self.report is None else log_probabilities(logits, tokens, self.report)


def _grid(prompt: Prompt) -> NDArray[np.int64] | None:
    """Return the grid of a prompt's pictures, where they keep sizes of their own."""
    return None if prompt.arrangement is None else prompt.arrangement.grid


def _features(model: VisionLanguageModel, prompt: Prompt) -> Tensor | None:
    """[T, E] features of a prompt's image slots; None without images."""
    if prompt.images is None or prompt.images.size(0) == 0:
        return None
    grid = _grid(prompt)
    pixels = prompt.images.to(local_device())
    if grid is None:
        encoded = [model.encode_images(part) for part in pixels.split(_IMAGES_AT_ONCE)]
    else:
        grids = torch.from_numpy(grid).split(_IMAGES_AT_ONCE)
        parts = pixels.split([int(own.prod(1).sum()) for own in grids])
        encoded = [model.encode_images(part, own) for part, own in zip(parts, grids, strict=True)]
    features_QVE = torch.cat([part for part in encoded if part is not None], dim=1 if grid is None else 0)
    index, weight = arrangement_on(prompt.arrangement, local_device())
    return model.arranged(features_QVE, index, weight)


def pack_prompts(
    prompts: Sequence[Prompt], pack_length: int, own: OwnPositions | None = None, spans: TwoWaySpans | None = None
) -> Batch:
    """Return prompts, with their answers so far, as the segments of one pack; ``own`` and ``spans`` are the model's."""
    return pack_segments(
        [[*prompt.tokens.tolist(), *prompt.answer] for prompt in prompts],
        pack_length,
        positions=None if own is None else [prompt.positions(own) for prompt in prompts],
        spans=spans,
        prompts=[len(prompt.tokens) for prompt in prompts],
        own=own,
    )
