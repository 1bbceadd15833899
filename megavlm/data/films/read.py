"""A film's frames, and their pixels as a plan has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megavlm.data.films.container import read_frames
from megavlm.data.films.film import Film
from megavlm.data.films.index import FilmIndex
from megavlm.data.films.plan import FilmError, FilmLayout, FilmPlan, PackedFilmPlan
from megavlm.data.films.streams import read_stream
from megavlm.data.image_colours import Alpha
from megavlm.data.patches import patch_rows
from megavlm.data.render import render_frame


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
    yield from _frames(film, film.index(), indices, alpha)


def _frames(film: Film, index: FilmIndex, indices: Sequence[int], alpha: Alpha) -> Iterator[Tensor]:
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
    index, shape = film.index(), layout.film
    if index.shape(shape.shown) != shape:
        raise FilmError("broken index", "the film is not the one that it was laid out for")
    rows = out
    if isinstance(plan, PackedFilmPlan):
        assert layout.patches is not None
        steps, height, width = layout.patches
        rows = out.view(steps, height * width, 3, plan.temporal, plan.patch**2)
    for number, frame in enumerate(_frames(film, index, layout.indices, alpha)):
        view = render_frame(frame, plan, layout, number)
        if isinstance(plan, PackedFilmPlan):
            patches = patch_rows(view, plan.merge, plan.patch)
            rows[number // plan.temporal, :, :, number % plan.temporal].copy_(patches)
        else:
            rows[number].copy_(view)
