"""Keys of what becomes of a film before the tower sees it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megavlm.config.fields import config_class

MOST_FRAMES = 4096
"""More frames of one film are never shown."""
FPS = 2.0
"""Frames that are shown of a second, where neither the recipe nor the kind says another number."""
GLM_SECONDS = 300.0
"""``max_seconds`` of GLM-4.1V's processor."""
BY_SECONDS = frozenset({"glm4v"})
"""Plans that have ``max_seconds``."""


@config_class
class VideoConfig:
    """What becomes of a film before the tower sees it (docs/data.md): frames, their size, and tokens.

    A null is the plan's own value, which is that of the family's published processor.
    """

    kind: str = "none"
    """Name of a registered film plan: qwen2_vl (also Qwen2.5-VL and LLaVA-OneVision-1.5), qwen3_vl, glm4v,
    llava_onevision, internvl; none where films are not read: a sample with one is then skipped, and counted."""
    fps: float | None = Field(default=None, gt=0, le=1000)
    """Frames that are taken of a second; null for 2, or as num_frames says."""
    num_frames: int | None = Field(default=None, gt=0, le=100_000)
    """Frames that are taken of a film, whatever its length; null for 32 (llava_onevision), 8 (internvl), or by fps."""
    min_frames: int | None = Field(default=None, gt=0, le=100_000)
    """Of qwen2_vl and qwen3_vl: frames that are taken by fps of a short film at least, as far as it has so many; null
    for 4."""
    max_frames: int | None = Field(default=None, gt=0, le=100_000)
    """Of qwen2_vl and qwen3_vl: frames that are taken by fps of a long film at most; null for 768."""
    max_seconds: float | None = Field(default=None, gt=0, le=1_000_000)
    """Of glm4v: of a longer film as many frames are taken as of one of this length; null for 300."""
    min_pixels: int | None = Field(default=None, gt=0)
    """Pixels that a smaller film is enlarged to: of a frame (qwen2_vl; null for those of 128 tokens), or of all frames
    together (qwen3_vl: null for those of 128 tokens; glm4v: 12,544)."""
    max_pixels: int | None = Field(default=None, gt=0)
    """Pixels that a larger frame is made smaller to; null for those of 768 tokens (qwen2_vl), or no such limit
    (qwen3_vl)."""
    total_pixels: int | None = Field(default=None, gt=0)
    """Pixels that a film is made smaller to: of all frames together (qwen3_vl: null for those of 768 tokens; glm4v:
    47,040,000), or with the frames of a patch counted once, and no less than 1.05 min_pixels for a frame (qwen2_vl;
    null for no such limit)."""
    sample_pixels: int | None = Field(default=None, gt=0)
    """Pixels of all films of a sample together, counted as total_pixels counts them; each picture and film has an equal
    part of them. Null for no such limit."""
    tokens_per_second: float | None = Field(default=None, gt=0, le=1000)
    """Of qwen2_vl: how far apart frames are in positions that lie a second apart (Qwen2.5-VL: 2); null for one from
    patch to patch, whatever the time (Qwen2-VL)."""
    positions_after: Literal["longest", "side"] = "longest"
    """Where positions of text go on behind a film of qwen2_vl: after the largest of its numbers, as the published code
    has it that the weights were trained with (and Transformers up to 5.2), or after its longer side, however long it
    takes (Transformers from 5.3)."""
    outer_marks: bool = False
    """Of qwen3_vl: whether a start and an end stand around the whole film too, not only around each step in time
    (Transformers from 5.0; the published code has none)."""
