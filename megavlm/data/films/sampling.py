"""Which frames of a film the published processors show: as many as they say, and the same ones.

Each function is one processor's ``sample_frames`` (Transformers 5.23, ``models/*/video_processing_*.py``), with what it
refuses done: where it asks for more frames than there are, all are shown.

n frames of a film, of which k are shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Indices = tuple[int, ...]


def evenly_from_the_start(frames: int, count: int) -> Indices:
    """Return k frames, each the first of an equal part (Qwen2-VL; counted in fp32, as ``torch.arange`` does)."""
    return _at(frames, count, 0.0)


def evenly_from_the_middle(frames: int, count: int) -> Indices:
    """Return k frames, each in the middle of an equal part (InternVL)."""
    return _at(frames, count, frames / count / 2)


def evenly_in_whole_numbers(frames: int, count: int) -> Indices:
    """Return k frames, each the first of an equal part (the processors that have no rule of their own)."""
    return tuple(index * frames // count for index in range(count))


def evenly_to_the_end(frames: int, count: int) -> Indices:
    """Return k frames from the first to the last (Qwen3-VL)."""
    import numpy as np  # noqa: PLC0415 - --help imports this module

    return tuple(int(one) for one in np.linspace(0, frames - 1, count).round())


def by_seconds(frames: int, rate: float, fps: float, most_seconds: float) -> Indices:
    """Return the frames at equal times (GLM-4.1V): none twice, but the last, so that their number is even.

    Args:
        frames: n.
        rate: Frames of the film in a second.
        fps: Frames that are wanted of a second.
        most_seconds: A longer film has as many frames as one of this length.
    """
    import numpy as np  # noqa: PLC0415 - --help imports this module

    last, seconds = frames - 1, frames / rate
    if seconds <= most_seconds:
        times = [index * rate / fps for index in range(max(math.floor(seconds * fps), 1))]
    elif int(most_seconds * fps) >= frames:
        times = [float(index) for index in range(frames)]
    else:
        times = [float(one * rate) for one in np.linspace(0, seconds, int(most_seconds * fps))]
    found = list(dict.fromkeys(min(last, math.ceil(one)) for one in times))
    return tuple(found + found[-1:] if len(found) % 2 else found)


def whole_patches(frames: int, rate: float, fps: float, limits: tuple[int, int], patch: int) -> int:
    """Return k of Qwen2-VL's rule: frames that fill patches, as far as the film has a patch's.

    Args:
        frames: n.
        rate: Frames of the film in a second.
        fps: Frames that are wanted of a second.
        limits: The fewest and the most.
        patch: Frames of a patch.
    """
    least, most = limits
    wanted = min(max(frames / rate * fps, least), min(most, frames) // patch * patch, frames)
    return math.floor(wanted / patch) * patch or min(frames, patch)


def thinned(frames: int, most: int) -> Indices:
    """Return all frames, or ``most`` of them from the first to the last where there are more."""
    return tuple(range(frames)) if frames <= most else evenly_to_the_end(frames, most)


def filled(indices: Sequence[int], patch: int) -> Indices:
    """Return frames with the last as often as its patch needs it."""
    return (*indices, *(indices[-1],) * (-len(indices) % patch))


def _at(frames: int, count: int, first: float) -> Indices:
    import numpy as np  # noqa: PLC0415 - --help imports this module

    return tuple(int(np.float32(first + index * (frames / count))) for index in range(count))
