"""Keys of what becomes of a picture before the tower sees it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megavlm.config.fields import config_class


@config_class
class ImageConfig:
    """What becomes of a picture before the tower sees it (docs/images.md): views, and tokens."""

    kind: str = "squash"
    """Name of a registered image plan. One view: squash (resized to a square), pad (in the middle of a square), fit
    (the same, resized first: DeepSeek-VL), crop (the square in its middle). Two renderings for two towers: fit_pair
    (DeepSeek-VL-7B), crop_squash (Vary: crop for the first, squash for the second),
    squash_pair (CogAgent, Cobra). Several: anyres (LLaVA-1.6),
    anyres_max (LLaVA-OneVision), dynamic_tiles (InternVL), split_tiles (Idefics3), slices (MiniCPM-V), canvas_tiles
    (Llama 3.2 Vision). Of its own size and proportions, for towers that take such pictures: native (Qwen2-VL), naflex
    (SigLIP 2)."""
    resample: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    """Filter that pictures are resized with; always antialiased."""
    fill: Literal["mean"] | tuple[int, int, int] | None = None
    """Colour beside a picture: mean (model.vision.image_mean), or red, green and blue from 0 to 255. Null for the
    plan's own: pad, fit and fit_pair take the mean (fit_pair the second tower's), the others black."""
    short_side: int | None = Field(default=None, gt=0, le=100_000)
    """Of crop: what the shorter side is resized to, in pixels; null for model.vision.image_size."""
    min_side: int | None = Field(default=None, gt=0, le=100_000)
    """Of fit and fit_pair: pixels that the shorter side has at least; null for 14."""
    pinpoints: tuple[tuple[int, int], ...] = ()
    """Of anyres and anyres_max: resolutions that tiles make up, as [height, width] in pixels, in the published order.
    Empty for LLaVA-1.6's five, or LLaVA-OneVision's 36."""
    min_tiles: int | None = Field(default=None, gt=0)
    """Of dynamic_tiles: fewest tiles of a picture; null for 1."""
    max_tiles: int | None = Field(default=None, gt=0)
    """Of dynamic_tiles and slices: most tiles of a picture (null for 12, or 9). Of anyres_max: tiles whose features a
    picture has at most (null for 9)."""
    thumbnail: bool = True
    """Of dynamic_tiles: whether the squashed picture stands behind its tiles."""
    longest_edge: int | None = Field(default=None, gt=0, le=4096)
    """Of split_tiles: what the longer side is resized to before the picture is cut, in pixels; null for that of four
    tiles."""
    image_splitting: bool = True
    """Of split_tiles: whether a picture is cut to tiles; else it is one view, squashed."""
    slice_markup: Literal["nested", "flat"] = "nested"
    """Of slices: nested in one <slice> (MiniCPM-V 2.0, 2.5), or each in its own (from 2.6)."""
    min_pixels: int | None = Field(default=None, gt=0)
    """Of native: pixels that a smaller picture is enlarged to; null for those of 4 tokens."""
    max_pixels: int | None = Field(default=None, gt=0)
    """Of native: pixels that a larger picture is made smaller to; null for those of 1280 tokens."""
    total_pixels: int | None = Field(default=None, gt=0)
    """Of native: pixels of all pictures of a sample together; each gets an equal part of them, and no less than
    min_pixels. Null for no such limit."""
    max_num_patches: int | None = Field(default=None, gt=0, le=1_000_000)
    """Of naflex: most patches of a picture, which is made as large as they allow; null for 256, as its processor."""
    enlarge_to_block: bool = False
    """Of native: whether a picture with a side that is shorter than one token's is first enlarged until it is as long
    (GLM-4.1V)."""
    options: tuple[str, ...] = ()
    """Of an image plan that another package brings: its own keys, as key=value each."""
