"""The image plan of towers that take pictures of any size: each keeps its proportions, within a budget of pixels.

Sizes are those of ``smart_resize`` in Transformers' processors of Qwen2-VL (arXiv 2409.12191), for images; with
``enlarge`` those of GLM-4.1V's (2507.01006). Those of ``naflex`` are SigLIP 2's (2502.14786, section 2.4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megavlm.config.errors import UserError
from megavlm.data.image_header import ImageError
from megavlm.data.media import Box, ImageLayout, ImagePlan, ImageShape, PackedPlan, TokenGrid, View, register_plan
from megavlm.data.plans_single import stretched

if TYPE_CHECKING:
    from megavlm.config.schema import ModelConfig

_LEAST_TOKENS, _MOST_TOKENS = 4, 1280
_NAFLEX_PATCHES = 256
_LONGEST = 200
"""How many times as long as wide a picture may be."""


@dataclass(frozen=True)
class NativePlan(PackedPlan):
    """The picture at its own size, rounded to whole blocks of patches; made smaller or larger to fit the budget."""

    patch: int = 14
    """Side of a patch, in pixels."""
    merge: int = 2
    """Side of the block of patches that becomes one token."""
    temporal: int = 2
    """Frames of a patch; a picture is shown in each of them."""
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    total_pixels: int | None = None
    """Of all pictures of a conversation; each gets an equal part, and no less than ``min_pixels``."""
    enlarge: bool = False
    """Whether a picture with a side shorter than a block is enlarged to a block's before its size is chosen."""

    def lay_out(self, shape: ImageShape) -> ImageLayout:
        """Return one view, with its grid of patches."""
        width, height = self.resized(shape)
        rows, columns = height // self.patch, width // self.patch
        tokens = rows * columns // self.merge**2
        view = View(0, Box(0, 0, width, height))
        return ImageLayout(
            shape, (stretched(shape, width, height),), (view,), (tokens,), patches=(1, rows, columns)
        )  # fmt: skip

    def resized(self, shape: ImageShape) -> tuple[int, int]:
        """Return the width and height that a picture is resized to.

        Raises:
            ImageError: It is too long and narrow.
        """
        most = self.max_pixels
        if self.total_pixels is not None:
            most = max(self.min_pixels, min(most, self.total_pixels // shape.images))
        size, block = (shape.width, shape.height), self.patch * self.merge
        return whole_blocks(enlarged(size, block) if self.enlarge else size, block, (self.min_pixels, most))

    def token_grids(self, layout: ImageLayout) -> tuple[TokenGrid, ...]:
        """Return the picture's blocks of patches."""
        assert layout.patches is not None
        frames, rows, columns = layout.patches
        return (TokenGrid(frames, rows // self.merge, columns // self.merge),)

    def features_of(self, layout: ImageLayout) -> int:
        """Return the picture's tokens."""
        return layout.tokens

    def views_of(self, layout: ImageLayout) -> float:
        """Return its tokens in units of those of the picture that the tower's ``image_size`` names."""
        return layout.tokens / self.tokens_per_view


@dataclass(frozen=True)
class QueriesPlan(NativePlan):
    """The same in front of a connector that makes as many tokens of any picture (``tokens_per_view``)."""

    def lay_out(self, shape: ImageShape) -> ImageLayout:
        """Return one view, with its grid of patches."""
        return replace(super().lay_out(shape), runs=(self.tokens_per_view,))

    def token_grids(self, layout: ImageLayout) -> tuple[TokenGrid, ...]:
        """Refuse: queries lie nowhere.

        Raises:
            UserError: Always.
        """
        raise UserError(
            "model.connector.preset: makes tokens that have no rows and columns, which the positions of this language"
            " model need; take another connector"
        )


@dataclass(frozen=True)
class NaflexPlan(NativePlan):
    """The picture as large as a number of patches allows, its sides rounded up to whole blocks."""

    max_num_patches: int = 256

    def resized(self, shape: ImageShape) -> tuple[int, int]:
        """Return the width and height that a picture is resized to.

        Raises:
            ImageError: It is too long and narrow.
        """
        size, block = (shape.width, shape.height), self.patch * self.merge
        if max(size) / min(size) > _LONGEST:
            raise _too_narrow(size)
        return filled(size, block, self.max_num_patches // self.merge**2)


@dataclass(frozen=True)
class NaflexQueriesPlan(NaflexPlan, QueriesPlan):
    """The same in front of a connector that makes as many tokens of any picture."""


def filled(size: tuple[int, int], block: int, most: int) -> tuple[int, int]:
    """Return the width and height, of whole blocks, of the largest copy of a picture that has at most so many of them.

    Found as ``get_image_size_for_max_num_patches`` of Transformers' processor of SigLIP 2 finds it: the scale is halved
    in between 1e-6 and 100 until it is known to 1e-5.
    """

    def scaled(scale: float) -> tuple[int, int]:
        width, height = (max(block, math.ceil(side * scale / block) * block) for side in size)
        return width, height

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        scale = (low + high) / 2
        width, height = scaled(scale)
        low, high = (scale, high) if width // block * (height // block) <= most else (low, scale)
    return scaled(low)


def enlarged(size: tuple[int, int], block: int) -> tuple[int, int]:
    """Return width and height, where a side is shorter than a block so much larger that it is as long."""
    width, height = size
    if not 0 < min(size) < block:
        return size
    scale = max(block / height, block / width)
    return int(width * scale), int(height * scale)  # by rounding errors it may be one pixel less


def whole_blocks(
    size: tuple[int, int], block: int, pixels: tuple[int, int], frames: tuple[int, int] = (1, 1)
) -> tuple[int, int]:
    """Return the width and height, of whole blocks, that keep proportions and a budget of pixels.

    Args:
        size: Width and height.
        block: Side of what becomes one token.
        pixels: The fewest and the most, of all frames.
        frames: How many there are, and how many are counted: those that fill patches.

    Raises:
        ImageError: One side is far longer than the other.
    """
    (width, height), (least, most), (shown, counted) = size, pixels, frames
    if max(size) / min(size) > _LONGEST:
        raise _too_narrow(size)
    # Halves are rounded to even numbers, as Python's and the processors' round does.
    wide, tall = round(width / block) * block, round(height / block) * block
    if counted * wide * tall > most:
        shrink = math.sqrt(shown * height * width / most)
        wide, tall = (max(block, math.floor(side / shrink / block) * block) for side in size)
    elif counted * wide * tall < least:
        grow = math.sqrt(least / (shown * height * width))
        wide, tall = (math.ceil(side * grow / block) * block for side in size)
    return wide, tall


def _too_narrow(size: tuple[int, int]) -> ImageError:
    return ImageError("too narrow", f"{size[0]} x {size[1]} pixels: one side is over {_LONGEST} times the other")


def _check_tower(model: ModelConfig) -> None:
    """Check that the tower takes pictures of any size.

    Raises:
        UserError: It does not.
    """
    vision, kind = model.vision, model.image.kind
    if not vision.packed:
        raise UserError(
            f"model.image.kind: {kind} needs a tower that takes pictures of any size, and {vision.preset!r} takes "
            "squares only; choose another image plan"
        )


def _native(model: ModelConfig) -> ImagePlan:
    _check_tower(model)
    vision, image = model.vision, model.image
    block = (vision.patch_size * vision.spatial_merge_size) ** 2
    least = _LEAST_TOKENS * block if image.min_pixels is None else image.min_pixels
    most = max(_MOST_TOKENS * block, least) if image.max_pixels is None else image.max_pixels
    for key, pixels in (("max_pixels", most), ("total_pixels", image.total_pixels)):
        if pixels is not None and pixels < least:
            raise UserError(
                f"model.image.{key}: {pixels} is less than model.image.min_pixels ({least}); correct one of them"
            )
    if most < block:
        raise UserError(f"model.image.max_pixels: {most} is less than one token takes ({block} pixels); raise it")
    kind = NativePlan if model.connector.spatial else QueriesPlan
    return kind(
        side=vision.image_size,
        tokens_per_view=model.tokens_per_view,
        resample=image.resample,
        patch=vision.patch_size,
        merge=vision.spatial_merge_size,
        temporal=vision.temporal_patch_size,
        min_pixels=least,
        max_pixels=most,
        total_pixels=image.total_pixels,
        enlarge=image.enlarge_to_block,
    )


def _naflex(model: ModelConfig) -> ImagePlan:
    _check_tower(model)
    vision, most = model.vision, model.image.max_num_patches or _NAFLEX_PATCHES
    if most < vision.spatial_merge_size**2:
        raise UserError(
            f"model.image.max_num_patches: {most} patches are less than one token takes "
            f"({vision.spatial_merge_size**2}: model.vision.spatial_merge_size squared); raise it"
        )
    kind = NaflexPlan if model.connector.spatial else NaflexQueriesPlan
    return kind(
        side=vision.image_size,
        tokens_per_view=model.tokens_per_view,
        resample=model.image.resample,
        patch=vision.patch_size,
        merge=vision.spatial_merge_size,
        temporal=vision.temporal_patch_size,
        min_pixels=vision.patch_size**2,
        max_pixels=most * vision.patch_size**2,
        max_num_patches=most,
    )


register_plan("native", NativePlan, _native, keys=("min_pixels", "max_pixels", "total_pixels", "enlarge_to_block"))
register_plan("naflex", NaflexPlan, _naflex, keys=("max_num_patches",))
