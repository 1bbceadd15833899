"""A film, whatever it is stored as: its index, its frames, and their pixels as a plan has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megavlm.data.films.container import is_frames, read_frames, read_frames_index
from megavlm.data.films.index import FilmIndex
from megavlm.data.films.plan import FilmError, FilmLayout, FilmPlan, PackedFilmPlan
from megavlm.data.films.source import MAX_FILM_BYTES, FilmData, read_all, size_of
from megavlm.data.films.streams import read_stream, read_stream_index
from megavlm.data.image_colours import Alpha
from megavlm.data.image_header import ImageError
from megavlm.data.patches import patch_rows
from megavlm.data.render import render_frame


@dataclass(frozen=True)
class Film:
    """A film of a sample."""

    data: FilmData
    """A film file, or frames as :mod:`megavlm.data.films.container` writes them."""
    stored: FilmData | None = None
    """Its index, where it was stored beside the film."""

    def index(self) -> FilmIndex:
        """Return its index.

        Raises:
            FilmError: It is no film that can be read.
            MachineError: PyAV is not installed.
        """
        return read_index(self.data) if self.stored is None else FilmIndex.from_bytes(read_all(self.stored))


def read_index(data: FilmData) -> FilmIndex:
    """Return a film's index, made of it.

    Raises:
        FilmError: It is no film that can be read.
        MachineError: PyAV is not installed.
    """
    size = size_of(data)
    if not size:
        raise FilmError("empty")
    if size > MAX_FILM_BYTES:
        raise FilmError("too large", f"{size:,} bytes, at most {MAX_FILM_BYTES:,}")
    try:
        return read_frames_index(data) if is_frames(data) else read_stream_index(data)
    except FilmError:
        raise
    except ImageError as error:
        raise FilmError(error.cause, str(error)) from None


def frames_of(film: Film, indices: Sequence[int], alpha: Alpha = "white") -> Iterator[Tensor]:
    """Yield the frames that stand for a plan's indices, [3, H, W] uint8 each; one at a time is held.

    Args:
        film: The film.
        indices: Increasing; one that stands several times is decoded once.
        alpha: What becomes of transparency.

    Raises:
        FilmError: One cannot be decoded.
        MachineError: PyAV is not installed.
    """
    index = film.index()
    wanted = index.picked(indices)
    if len(wanted) and int(wanted[-1]) >= index.frames:
        raise FilmError("broken index", "the film has not as many frames as it was laid out for")
    distinct = np.unique(wanted)
    numbers = [int(one) for one in distinct]
    decoded: Iterator[Any] = (
        read_frames(film.data, numbers, alpha) if index.sampled else read_stream(film.data, index, numbers, alpha)
    )
    for number, pixels in zip(numbers, decoded, strict=True):
        frame = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
        for _ in range(int((wanted == number).sum())):
            yield frame


def fill(out: Tensor, film: Film, plan: FilmPlan, layout: FilmLayout, alpha: Alpha = "white") -> None:
    """Decode a film's frames and write their pixels.

    Args:
        out: Of ``plan.pixels_of(layout)``, uint8.
        film: The film.
        plan: What becomes of it.
        layout: Its layout.
        alpha: What becomes of transparency.

    Raises:
        FilmError: A frame cannot be decoded.
        MachineError: PyAV is not installed.
    """
    shape = layout.film
    if film.index().shape(shape.shown) != shape:
        raise FilmError("broken index", "the film is not the one that it was laid out for")
    rows = out
    if isinstance(plan, PackedFilmPlan):
        assert layout.patches is not None
        steps, height, width = layout.patches
        rows = out.view(steps, height * width, 3, plan.temporal, plan.patch**2)
    for number, frame in enumerate(frames_of(film, layout.indices, alpha)):
        view = render_frame(frame, plan, layout, number)
        if isinstance(plan, PackedFilmPlan):
            patches = patch_rows(view, plan.merge, plan.patch)
            rows[number // plan.temporal, :, :, number % plan.temporal].copy_(patches)
        else:
            rows[number].copy_(view)
