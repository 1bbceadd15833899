"""Packing: which samples share a pack, and how a pack is laid out.

:class:`CarryOverPacker` keeps a pool of waiting samples. Each pack holds the oldest of them, so that nobody
waits for ever, and the others that fill the rest best: an exact subset sum over the pool. What is not taken
stays in the pool. A group is never cut off at the end of a buffer, so fills of 99.8 % and more are usual.

Tokens are the work of every pipeline stage; images (their views, where a plan cuts them into tiles) are the work of the
first one alone. Packs of equal length may still hold few or many, and then the pipeline waits for its first stage.
Therefore :func:`choose_pack` takes, among the choices that fill a pack equally well, the one with the number of views
that is nearest the average of the waiting samples (``data.balance_images``). Pictures that keep sizes of their own are
weighed instead of counted: by what the tower's cost says of their patches. It depends on what it is given and on
nothing else, so a restart needs no more state than the waiting samples and the number of packs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from megavlm.data.batch import Pack, make_pack
from megavlm.data.chat import EncodedSample
from megavlm.data.films.film import Film
from megavlm.data.films.plan import FilmShape
from megavlm.data.media import ImageLayout, ImagePlan, ImageShape
from megavlm.data.positions import OwnPositions, grids_of
from megavlm.data.spans import TwoWaySpans


class HasLength(Protocol):
    """Anything with a length in tokens."""

    def __len__(self) -> int:
        """Tokens."""
        ...


T = TypeVar("T", bound=HasLength)
Weigh = Callable[[Sequence[ImageLayout]], int]
"""Says how heavy the pictures of a sample are to the first stage, in a unit of its own."""


@dataclass(frozen=True)
class PackableSample:
    """A sample with everything that its pack needs."""

    encoded: EncodedSample
    """Tokens and labels."""
    images: tuple[bytes | Film, ...]
    """Encoded image files and films, in the order in which they are shown."""
    key: str
    """Name of the sample in logs."""
    source: int
    """Index of its data set in the blend."""
    shard: str = ""
    """File that it lies in."""
    shapes: tuple[ImageShape | FilmShape, ...] = ()
    """What the image plan asks of each image and film."""
    views: int = 0
    """Pictures that the tower sees; where they keep sizes of their own, how heavy they are (:data:`Weigh`)."""

    def __len__(self) -> int:
        """Tokens."""
        return len(self.encoded.tokens)


_EXACT_TOKENS = 4096
"""Longer packs are balanced in two parts: the oldest samples fill them down to this room, which is then filled exactly.
The table of reachable sums grows with the square of the room, and images even out in long packs by themselves."""
_GOLDEN = (5**0.5 - 1) / 2


def choose_pack(
    lengths: Sequence[int], capacity: int, images: Sequence[int] | None = None, number: int = 0
) -> list[int]:
    """Choose the oldest sample and those that best fill the rest of the pack with it.

    The sum of the chosen lengths is the largest possible with the first one in it; among equals, older
    samples are preferred. With ``images``, the number of images decides first among equals: it is less than one away
    from the average of the waiting samples, which is their images per token times ``capacity``, or as near to it as
    possible. The average is moved by up to half an image, depending on ``number``, so that packs with 3 and with 4
    images are mixed evenly where it is 3.4.

    Args:
        lengths: Lengths of the waiting samples in tokens, oldest first, each from 1 to ``capacity``.
        capacity: Tokens of a pack.
        images: Images of each waiting sample; None leaves them out of account.
        number: Packs that were made before, with ``images``.

    Returns:
        Increasing indices into ``lengths``; the first is 0. Empty for no samples.

    Raises:
        ValueError: A length is not from 1 to ``capacity``.
    """
    if not lengths:
        return []
    if min(lengths) < 1 or max(lengths) > capacity:
        raise ValueError(f"sample lengths must be from 1 to {capacity}, not {min(lengths)} to {max(lengths)}")
    if images is not None and any(images):
        # Multiples of the golden section fall evenly into every interval, however few are taken.
        average = sum(images) * capacity / sum(lengths)
        return _choose_balanced(lengths, capacity, images, average + (number * _GOLDEN) % 1.0 - 0.5)
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


def _choose_balanced(lengths: Sequence[int], capacity: int, images: Sequence[int], wanted: float) -> list[int]:
    """Choose as :func:`choose_pack` does, with ``wanted`` images: a subset sum over tokens and images together."""
    given = [0]
    room, wanted = capacity - lengths[0], wanted - images[0]
    for index in range(1, len(lengths)):
        if room <= _EXACT_TOKENS:
            break
        if lengths[index] <= room:
            given.append(index)
            room, wanted = room - lengths[index], wanted - images[index]
    taken = set(given)
    rest = [index for index in range(len(lengths)) if index not in taken and lengths[index] <= room]
    # No choice holds more images than the room at the highest number of images per token.
    rows = 1 + max((room * images[index] // lengths[index] for index in rest), default=0)
    # Row k, bit s of reached[i]: some of the first i of the rest have k images and sum to s. Rows are twice as wide
    # as the room, so that a sum beyond it does not run into the next row before it is cut off.
    width = 2 * room + 1
    ones = (1 << (room + 1)) - 1
    limit = sum(ones << (row * width) for row in range(rows))
    # A full pack with either whole number beside the wanted one is good enough to stop: looking further for the nearer
    # one takes younger samples, and those that go with no other wait in the pool until it fills packs less well.
    target = sum(1 << (row * width + room) for row in range(rows) if abs(row - wanted) < 1)
    reached = [1]
    for index in rest:
        if reached[-1] & target:
            break
        shifted = reached[-1] << (images[index] * width + lengths[index])
        reached.append((reached[-1] | shifted) & limit)
    sums = [(reached[-1] >> (row * width) & ones).bit_length() - 1 for row in range(rows)]
    row = min(range(rows), key=lambda row: (-sums[row], abs(row - wanted)))
    at = row * width + sums[row]
    chosen = []
    for position in range(len(reached) - 1, 0, -1):
        if not reached[position - 1] >> at & 1:
            index = rest[position - 1]
            chosen.append(index)
            at -= images[index] * width + lengths[index]
    assert at == 0
    return sorted(given + chosen)


class CarryOverPacker(Generic[T]):
    """Packs a stream of samples; at most ``buffer_size`` wait at a time."""

    def __init__(self, capacity: int, buffer_size: int, images: Callable[[T], int] | None = None) -> None:
        """Make an empty packer for packs of ``capacity`` tokens, balanced if ``images`` says how many a sample has."""
        self.capacity = capacity
        self.buffer_size = buffer_size
        self.images = images
        self.packs = 0
        """Packs made so far."""
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
        images = None if self.images is None else [self.images(sample) for sample in self.pool]
        chosen = choose_pack([len(sample) for sample in self.pool], self.capacity, images, self.packs)
        self.packs += bool(chosen)
        pack = [self.pool[index] for index in chosen]
        for index in reversed(chosen):
            del self.pool[index]
        return pack


def build_pack(
    samples: Sequence[PackableSample],
    sequence_length: int,
    pad_token: int,
    plan: ImagePlan | None = None,
    positions: OwnPositions | None = None,
    spans: TwoWaySpans | None = None,
) -> Pack:
    """Lay samples out as one pack of S = ``sequence_length`` positions, as :func:`make_pack` does.

    Args:
        samples: At least one, in order; together no longer than S.
        sequence_length: S.
        pad_token: Token of the padding, ``<|endoftext|>``.
        plan: With ``positions``, what became of the pictures.
        positions: How the model's positions are made, where they are not counted.
        spans: Which positions see each other both ways, where some do.

    Raises:
        ValueError: There are no samples, or they do not fit.
    """
    if not samples:
        raise ValueError(f"no samples do not make a pack of {sequence_length}")
    grids = None
    if positions is not None and positions.on_grids:
        assert plan is not None
        grids = [grids_of(plan, [plan.of(shape) for shape in sample.shapes]) for sample in samples]
    return make_pack(
        [sample.encoded.tokens for sample in samples],
        sequence_length,
        labels=[sample.encoded.labels for sample in samples],
        weights=[sample.encoded.weights for sample in samples],
        sources=[sample.source for sample in samples],
        pad_token=pad_token,
        positions=positions,
        grids=grids,
        spans=spans,
        images=[image for sample in samples for image in sample.images],
        sample_keys=[sample.key for sample in samples],
        sample_shards=[sample.shard for sample in samples],
        image_shapes=[shape for sample in samples for shape in sample.shapes],
    )
