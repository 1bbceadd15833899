"""Keys of what becomes of a film before the tower sees it."""

from __future__ import annotations

from pydantic import Field

from megavlm.config.fields import config_class


@config_class
class VideoConfig:
    """What becomes of a film before the tower sees it (docs/data.md): frames, their size, and tokens.

    A null is the plan's own value, which is that of the family's published processor.
    """

    kind: str = "none"
    """Name of a registered film plan; none where films are not read: a sample with one is then skipped, and counted."""
    fps: float | None = Field(default=None, gt=0, le=1000)
    """Frames that are taken of a second."""
    num_frames: int | None = Field(default=None, gt=0, le=100_000)
    """Frames that are taken of a film, whatever its length, where the plan has a fixed number."""
    min_frames: int | None = Field(default=None, gt=0, le=100_000)
    """Frames that are taken of a short film at least, as far as it has so many."""
    max_frames: int | None = Field(default=None, gt=0, le=100_000)
    """Frames that are taken of a long film at most."""
    min_pixels: int | None = Field(default=None, gt=0)
    """Pixels that a smaller frame is enlarged to."""
    max_pixels: int | None = Field(default=None, gt=0)
    """Pixels that a larger frame is made smaller to."""
    total_pixels: int | None = Field(default=None, gt=0)
    """Pixels of all frames of a film together; each frame gets an equal part."""
