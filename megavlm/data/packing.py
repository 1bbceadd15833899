"""Packing: which samples share a pack, and how a pack is laid out.

:class:`CarryOverPacker` keeps a pool of waiting samples. Each pack holds the oldest of them, so that nobody
waits for ever, and the others that fill the rest best: an exact subset sum over the pool. What is not taken
stays in the pool. A group is never cut off at the end of a buffer, so fills of 99.8 % and more are usual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

from megavlm.data.batch import IGNORE_INDEX, Pack
from megavlm.data.chat import EncodedSample


class HasLength(Protocol):
    """Anything with a length in tokens."""

    def __len__(self) -> int:
        """Tokens."""
        ...


T = TypeVar("T", bound=HasLength)


@dataclass(frozen=True)
class PackableSample:
    """A sample with everything that its pack needs."""

    encoded: EncodedSample
    """Tokens and labels."""
    images: tuple[bytes, ...]
    """Encoded image files, one for each image slot."""
    key: str
    """Name of the sample in logs."""
    source: int
    """Index of its data set in the blend."""
    shard: str = ""
    """File that it lies in."""

    def __len__(self) -> int:
        """Tokens."""
        return len(self.encoded.tokens)


def choose_pack(lengths: Sequence[int], capacity: int) -> list[int]:
    """Choose the oldest sample and those that best fill the rest of the pack with it.

    The sum of the chosen lengths is the largest possible with the first one in it; among equals, older
    samples are preferred.

    Args:
        lengths: Lengths of the waiting samples in tokens, oldest first, each from 1 to ``capacity``.
        capacity: Tokens of a pack.

    Returns:
        Increasing indices into ``lengths``; the first is 0. Empty for no samples.

    Raises:
        ValueError: A length is not from 1 to ``capacity``.
    """
    if not lengths:
        return []
    if min(lengths) < 1 or max(lengths) > capacity:
        raise ValueError(f"sample lengths must be from 1 to {capacity}, not {min(lengths)} to {max(lengths)}")
    room = capacity - lengths[0]
    # Bit s of reached[i] says whether some of the samples 1..i sum to s.
    reached = [1]
    limit = (1 << (room + 1)) - 1
    target = 1 << room
    for length in lengths[1:]:
        if reached[-1] & target:
            break
        reached.append((reached[-1] | reached[-1] << length) & limit)
    left = reached[-1].bit_length() - 1
    chosen = []
    for index in range(len(reached) - 1, 0, -1):
        if not reached[index - 1] >> left & 1:
            chosen.append(index)
            left -= lengths[index]
    assert left == 0
    return [0, *reversed(chosen)]


class CarryOverPacker(Generic[T]):
    """Packs a stream of samples; at most ``buffer_size`` wait at a time."""

    def __init__(self, capacity: int, buffer_size: int) -> None:
        """Make an empty packer for packs of ``capacity`` tokens."""
        self.capacity = capacity
        self.buffer_size = buffer_size
        self.pool: list[T] = []
        """Waiting samples, oldest first."""

    def add(self, sample: T) -> list[T] | None:
        """Take a sample in.

        Returns:
            A pack, once the pool is full; else None.

        Raises:
            ValueError: The sample is empty or longer than a pack; it is not taken in.
        """
        if not 1 <= len(sample) <= self.capacity:
            raise ValueError(f"sample of {len(sample)} tokens does not fit packs of {self.capacity}")
        self.pool.append(sample)
        return self.pop() if len(self.pool) >= self.buffer_size else None

    def pop(self) -> list[T]:
        """Make a pack of the waiting samples; empty if there are none."""
        chosen = choose_pack([len(sample) for sample in self.pool], self.capacity)
        pack = [self.pool[index] for index in chosen]
        for index in reversed(chosen):
            del self.pool[index]
        return pack


def build_pack(samples: Sequence[PackableSample], sequence_length: int, pad_token: int) -> Pack:
    """Lay samples out as one pack of S = ``sequence_length`` positions.

    Labels are shifted within each segment: a position's label is the label of the next one, and the last
    position of a segment has none. Positions start at 0 in each segment. What is left over is one segment of
    ``pad_token`` without labels.

    Args:
        samples: At least one, in order; together no longer than S.
        sequence_length: S.
        pad_token: Token of the padding, ``<|endoftext|>``.

    Raises:
        ValueError: There are no samples, or they do not fit.
    """
    lengths = [len(sample) for sample in samples]
    used = sum(lengths)
    if not samples or used > sequence_length:
        raise ValueError(f"{len(samples)} samples of {used} tokens do not make a pack of {sequence_length}")
    tokens = np.full(sequence_length, pad_token, np.int64)
    labels = np.full(sequence_length, IGNORE_INDEX, np.int64)
    sources = [sample.source for sample in samples]
    if used < sequence_length:
        lengths.append(sequence_length - used)
        sources.append(-1)
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    for sample, start, end in zip(samples, bounds, bounds[1:], strict=False):
        tokens[start:end] = sample.encoded.tokens
        labels[start : end - 1] = sample.encoded.labels[1:]
    return Pack(
        tokens=tokens,
        labels=labels,
        position_ids=np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
        cu_seqlens=bounds,
        segment_sources=np.asarray(sources, np.int32),
        images=[image for sample in samples for image in sample.images],
        sample_keys=[sample.key for sample in samples],
        sample_shards=[sample.shard for sample in samples],
    )
