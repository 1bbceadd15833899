"""Encoded image files to the uint8 views of an image plan, behind one interface: DALI, simplejpeg with torch, or PIL.

All of them turn images upright by EXIF or XMP, lay what is transparent over white, make RGB of everything, and make
views of it by :mod:`megavlm.data.media`, resized with antialiasing. Only plain JPEG and PNG files go to the fast path;
odd ones go to PIL one by one, and what PIL cannot read, or has no memory for, becomes gray views, and the image's index
is returned. A bad image never costs a neighbour.
"""

from __future__ import annotations

import importlib.util
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from megavlm.data.films.film import Film
from megavlm.data.films.plan import FilmError, FilmLayout
from megavlm.data.films.read import fill
from megavlm.data.image_colours import Alpha
from megavlm.data.images import (
    OUT_OF_MEMORY,
    ImageError,
    ImageHeader,
    decode_jpeg,
    decode_with_pil,
    lay_out,
    read_header,
)
from megavlm.data.media import Arrangement, ImageLayout, ImagePlan, PackedPlan, arrange, pixels_of
from megavlm.data.patches import patches_of
from megavlm.data.plans_single import SquashPlan
from megavlm.data.render import render_with_pil, render_with_torch

logger = logging.getLogger(__name__)

GRAY = 128
"""Value of every pixel of an image that cannot be decoded."""

_FIXES = {
    "simplejpeg": "pip install simplejpeg",
    "dali": "pip install nvidia-dali-cuda120",
}


@dataclass
class DecodedImages:
    """The pixels of some images."""

    pixels: torch.Tensor
    """[V, 3, side, side] uint8 RGB of all their views, on the decoder's device; or [P, F] uint8 patches of them
    (``plan.packed``), or [N, F] with the renderings of each in one row (``plan.joined``)."""
    failed: list[int] = field(default_factory=list)
    """Indices of the images that could not be decoded and are gray; mask their samples' labels."""
    causes: list[str] = field(default_factory=list)
    """Why, for each of them."""


@dataclass
class DecodeTask:
    """An image that is to be decoded."""

    data: bytes
    plan: ImagePlan
    out: torch.Tensor
    """[views, 3, side, side], [patches, F] or [1, F] uint8, to be filled."""
    layout: ImageLayout | None
    """None where any size will do: the plan's views are the same for all."""
    header: ImageHeader | None = None

    def laid_out(self, width: int, height: int) -> ImageLayout:
        """Return the layout of the picture, now that it is known how large it is.

        Raises:
            ImageError: It is not as large as was told from its header, on which the number of its tokens depends.
        """
        if self.layout is None:
            return self.plan.plan(width, height)
        if (width, height) != self.layout.shape[:2]:
            was = f"{self.layout.shape.width} x {self.layout.shape.height}"
            raise ImageError("broken header", f"{was} pixels by its header, {width} x {height} when decoded")
        return self.layout

    def fill(self, views: Iterable[torch.Tensor]) -> None:
        """Take the picture's views, [3, H, W] uint8 each."""
        if isinstance(self.plan, PackedPlan):
            left = self.out
            for view in views:
                patches = patches_of(view, self.plan)
                left[: len(patches)].copy_(patches)
                left = left[len(patches) :]
            return
        if self.plan.joined:
            self.out.copy_(torch.cat([view.flatten() for view in views]).unsqueeze(0))
            return
        for out, view in zip(self.out, views, strict=True):
            out.copy_(view)


class ImageDecoder(ABC):
    """Decodes images to views. One thread at a time may use a decoder.

    Args:
        alpha: What becomes of transparency, see ``data.image_alpha``.
    """

    def __init__(self, alpha: Alpha = "white") -> None:
        self.alpha: Alpha = alpha
        self.failures: Counter[str] = Counter()
        """Images that became gray so far, by cause."""
        self.device = torch.device("cpu")
        """Where the pixels are made."""

    def decode(
        self, images: Sequence[bytes | Film], plan: ImagePlan | int, layouts: Sequence[ImageLayout] | None = None
    ) -> DecodedImages:
        """Decode images and films, and make their views.

        Args:
            images: N encoded image files and films; N may be 0.
            plan: What becomes of them; a whole number squashes each to a square of this side.
            layouts: Layout of each; None where the plan has the same views for all (``plan.fixed``), and there are no
                films.
        """
        plan = SquashPlan(plan, 0) if isinstance(plan, int) else plan
        assert plan.square or plan.packed or plan.joined, "views that are not square are made by megavlm.data.render"
        assert plan.fixed or layouts is not None, "how many views a picture has is told by its layout"
        counts = [1] * len(images) if layouts is None else [pixels_of(plan, layout)[0] for layout in layouts]
        pixels = torch.empty((sum(counts), *plan.row), dtype=torch.uint8, device=self.device)
        outs = pixels.split(counts) if images else ()
        fast: dict[int, DecodeTask] = {}
        slow: list[int] = []
        failed: dict[int, str] = {}
        jobs: dict[int, DecodeTask] = {}
        for index, (data, out) in enumerate(zip(images, outs, strict=True)):
            if isinstance(data, bytes):
                jobs[index] = DecodeTask(data, plan, out, None if plan.fixed or layouts is None else layouts[index])
                continue
            assert layouts is not None, "how many frames a film has is told by its layout"
            try:
                self._decode_film(data, plan, layouts[index], out)
            except ImageError as error:
                failed[index] = self._fail(error)
        for index, job in jobs.items():
            try:
                job.header = read_header(job.data)
            except ImageError as error:
                failed[index] = self._fail(error)
                continue
            if self._is_fast(job.header):
                fast[index] = job
            else:
                slow.append(index)
        if fast:
            slow += self._decode_fast(fast)
        for index in slow:
            try:
                self._decode_slow(jobs[index])
            except ImageError as error:
                failed[index] = self._fail(error)
        order = sorted(failed)
        for index in order:
            outs[index].fill_(GRAY)
        return DecodedImages(pixels, order, [failed[index] for index in order])

    def decode_prompt(
        self, images: Sequence[bytes | Film], plan: ImagePlan
    ) -> tuple[DecodedImages, Arrangement | None]:
        """Decode the images and films of one prompt, and return where the features of their views go.

        Raises:
            ImageError: How many views an image has cannot be told.
        """
        if plan.fixed and all(isinstance(one, bytes) for one in images):
            return self.decode(images, plan), None
        layouts = lay_out(images, plan)
        return self.decode(images, plan, layouts), arrange(plan, layouts)

    @abstractmethod
    def _is_fast(self, header: ImageHeader) -> bool:
        """Whether the fast path takes such an image."""

    @abstractmethod
    def _decode_fast(self, jobs: Mapping[int, DecodeTask]) -> list[int]:
        """Fill the jobs' ``out``; return the indices of those that need PIL."""

    def _decode_slow(self, job: DecodeTask) -> None:
        try:
            picture = decode_with_pil(job.data, self.alpha)
            views = render_with_pil(picture, job.plan, job.laid_out(*picture.size))
            job.fill(torch.from_numpy(view).permute(2, 0, 1) for view in views)
        except MemoryError:
            raise ImageError(OUT_OF_MEMORY) from None

    def _decode_film(self, film: Film, plan: ImagePlan, layout: ImageLayout, out: torch.Tensor) -> None:
        """Fill ``out`` with a film's frames, whatever decodes pictures: FFmpeg decodes them, torch resizes."""
        assert isinstance(layout, FilmLayout) and plan.films is not None
        try:
            if out.device.type == "cpu":
                fill(out, film, plan.films, layout, self.alpha)
                return
            pixels = torch.empty(out.shape, dtype=out.dtype)
            fill(pixels, film, plan.films, layout, self.alpha)
            out.copy_(pixels)
        except MemoryError:
            raise FilmError(OUT_OF_MEMORY) from None

    def _fail(self, error: ImageError) -> str:
        self.failures[error.cause] += 1
        logger.debug("image cannot be decoded: %s", error)
        return error.cause


class PilDecoder(ImageDecoder):
    """PIL for everything: slow, and the yardstick for the others."""

    def _is_fast(self, header: ImageHeader) -> bool:
        return False

    def _decode_fast(self, jobs: Mapping[int, DecodeTask]) -> list[int]:
        return list(jobs)


class SimpleJpegDecoder(ImageDecoder):
    """libjpeg-turbo through simplejpeg, resized by torch in uint8: the fastest on a CPU."""

    def __init__(self, alpha: Alpha = "white") -> None:
        super().__init__(alpha)
        require("simplejpeg", "simplejpeg")

    def _is_fast(self, header: ImageHeader) -> bool:
        return header.kind == "jpeg" and header.plain

    def _decode_fast(self, jobs: Mapping[int, DecodeTask]) -> list[int]:
        rescue = []
        for index, job in jobs.items():
            try:
                picture = decode_jpeg(job.data)
                layout = job.laid_out(picture.shape[1], picture.shape[0])
                job.fill(render_with_torch(picture, job.plan, layout))
            except (ValueError, MemoryError, RuntimeError):  # torch has no MemoryError for its own allocations
                rescue.append(index)
        return rescue


def installed(module: str) -> bool:
    """Whether a package is there."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def require(name: str, module: str) -> None:
    """Check that the package of a decoder is there.

    Raises:
        ImportError: it is not; the message says how to install it.
    """
    if not installed(module):
        raise ImportError(f"data.image_decoder {name} needs the package {module}: {_FIXES[name]}")
