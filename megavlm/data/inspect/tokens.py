"""A pack's tokens as pieces of text that can be coloured: supervised or masked, pictures, borders."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megavlm.data.batch import IGNORE_INDEX, Pack
from megavlm.data.box_notations import find_boxes
from megavlm.data.box_space import BoxSpace, ReadBoxes
from megavlm.data.films.film import Film
from megavlm.data.images import ImageError, upright_size
from megavlm.data.media import ImageLayout, ImagePlan
from megavlm.data.read_pack import image_starts
from megavlm.data.tokenizer import Tokenizer

_MOST_TOKENS_OF_A_CHARACTER = 4
_CONTEXT = 8
# What is named stands in front of its box, in the question or in the answer.
_TURN = re.compile(r"(?<=</ref>)<\|im_end\|>\n<\|im_start\|>assistant\n(?=<box>|<quad>)")
_QUAD = re.compile(r"(?:<ref>([^<]*)</ref>)?<quad>((?:\(\d{1,4},\d{1,4}\),?){4})</quad>")
_POINT = re.compile(r"\((\d+),(\d+)\)")


@dataclass(frozen=True)
class ShownTokens:
    """One or several tokens that are shown together."""

    text: str
    ids: tuple[int, ...]
    supervised: bool
    """Whether the loss counts their prediction (from the token before)."""
    image: int | None = None
    """Index in the segment of the picture or film whose slots these are."""
    weight: float = 1.0
    """What the loss of their prediction is multiplied by."""


@dataclass(frozen=True)
class Shape:
    """A box or quadrilateral in the text."""

    kind: str
    """``box`` or ``quad``."""
    name: str
    points: tuple[tuple[int, int], ...]
    """Corners in thousandths of the picture's sides: four of them."""


@dataclass(frozen=True)
class Segment:
    """A sample in a pack, or its padding."""

    start: int
    end: int
    source: int
    """Index of its data set; -1 for padding."""
    key: str
    images: tuple[bytes | Film, ...]
    layouts: tuple[ImageLayout, ...]
    """Of these images; none where all have the same."""
    pieces: tuple[ShownTokens, ...]
    supervised: int
    """Tokens that the loss counts."""
    shapes: tuple[Shape, ...]


def segments(pack: Pack, tokenizer: Tokenizer, plan: ImagePlan, space: BoxSpace | None = None) -> list[Segment]:
    """Take a pack apart by its ``cu_seqlens``, with the pictures and films that belong to each segment.

    ``space`` is what the numbers of boxes count; None where they count parts of the picture.
    """
    layouts = pack.layouts(plan)
    starts = image_starts(pack, plan, tokenizer.imgpad_id)
    found = []
    for index, (start, end) in enumerate(zip(pack.cu_seqlens, pack.cu_seqlens[1:], strict=False)):
        start, end, source = int(start), int(end), int(pack.segment_sources[index])
        ids = [int(i) for i in pack.tokens[start:end]]
        # A label is what the position before has to predict.
        trained = [False, *(bool(label != IGNORE_INDEX) for label in pack.labels[start : end - 1])]
        first, last = np.searchsorted(starts, [start, end])
        key = pack.sample_keys[index] if source >= 0 else ""
        weights = [1.0] * len(ids)
        if pack.loss_weights is not None:
            weights[1:] = pack.loss_weights[start : end - 1].tolist()
        pieces = tuple(_pieces(ids, trained, weights, tokenizer, starts[first:last] - start)) if source >= 0 else ()
        text = "".join(piece.text for piece in pieces if piece.image is None)
        images = tuple(pack.images[first:last])
        own = () if layouts is None else tuple(layouts[first:last])
        marks = tuple(shapes(text, _reader(images, space)))
        found.append(Segment(start, end, source, key, images, own, pieces, sum(trained), marks))
    return found


def shapes(text: str, read: ReadBoxes = find_boxes) -> Iterator[Shape]:
    """Yield the boxes that ``read`` finds in a text, and the quadrilaterals in Qwen-VL's notation."""
    text = _TURN.sub("", text)
    for name, sides in read(text):
        left, top, right, bottom = (round(1000 * side) for side in sides)
        yield Shape("box", name or "", ((left, top), (right, top), (right, bottom), (left, bottom)))
    for match in _QUAD.finditer(text):
        yield Shape("quad", (match[1] or "").strip(), tuple((int(x), int(y)) for x, y in _POINT.findall(match[2])))


def _reader(images: Sequence[bytes | Film], space: BoxSpace | None) -> ReadBoxes:
    """Return what finds the boxes of a segment's texts, which are of its first picture."""
    first = next((data for data in images if isinstance(data, bytes)), None)
    if space is None or first is None or not (space.pixels or space.plane):
        return find_boxes
    try:
        return space.of(upright_size(first))
    except ImageError:  # nothing is drawn on it: the page tells why
        return find_boxes


def _pieces(
    ids: Sequence[int],
    trained: Sequence[bool],
    weights: Sequence[float],
    tokenizer: Tokenizer,
    starts: NDArray[np.int64],
) -> Iterator[ShownTokens]:
    """Yield the pieces of a segment; ``starts`` are the first slots of its pictures and films."""
    position = 0
    context: list[Sequence[int]] = []
    while position < len(ids):
        if ids[position] == tokenizer.imgpad_id:
            end = position
            while end < len(ids) and ids[end] == tokenizer.imgpad_id:
                end += 1
            for begin, until in pairwise([position, *starts[(starts > position) & (starts < end)].tolist(), end]):
                image = int(np.searchsorted(starts, begin, side="right")) - 1
                slots = tuple(ids[begin:until])
                yield ShownTokens(f"{until - begin} slots", slots, any(trained[begin:until]), image)
            position, context = end, []
            continue
        before = [i for whole in context for i in whole]
        end = position + 1
        text = _text(before, ids[position:end], tokenizer)
        # A character may be made of several tokens, none of which is text.
        while "\ufffd" in text and _may_grow(ids, trained, position, end, tokenizer):
            end += 1
            text = _text(before, ids[position:end], tokenizer)
        yield ShownTokens(text, tuple(ids[position:end]), trained[position], weight=weights[position])
        # Whole characters only: the bytes of half a one would spoil those behind them in some tokenizers.
        context = [*context, ids[position:end]][-_CONTEXT:]
        position = end


def _may_grow(ids: Sequence[int], trained: Sequence[bool], start: int, end: int, tokenizer: Tokenizer) -> bool:
    return (
        end < len(ids)
        and end - start < _MOST_TOKENS_OF_A_CHARACTER
        and trained[end] == trained[start]
        and ids[end] not in tokenizer.control_ids
    )


def _text(before: Sequence[int], ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """What ``ids`` add to the text: some tokenizers drop the space in front of a token that stands alone."""
    known = tokenizer.decode(before) if before else ""
    whole = tokenizer.decode([*before, *ids])
    return whole[len(known) :] if whole.startswith(known) else tokenizer.decode(ids)
