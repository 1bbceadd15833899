"""Encoded image files to square uint8 pixels, behind one interface: DALI, simplejpeg with torch, or PIL.

All of them turn images upright by EXIF or XMP, lay what is transparent over white, make RGB of everything, squash to a
square and resize with antialiased bicubic interpolation. Only plain JPEG and PNG files go to the fast path; odd ones go
to PIL one by one, and what PIL cannot read, or has no memory for, becomes a gray image whose index is returned. A bad
image never costs a neighbour.
"""

from __future__ import annotations

import importlib.util
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from megavlm.config.errors import UserError
from megavlm.data.image_colours import Alpha
from megavlm.data.images import OUT_OF_MEMORY, ImageError, ImageHeader, decode_jpeg, decode_with_pil, read_header

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
    """[N, 3, size, size] uint8 RGB on the decoder's device."""
    failed: list[int] = field(default_factory=list)
    """Indices of the images that could not be decoded and are gray; mask their samples' labels."""
    causes: list[str] = field(default_factory=list)
    """Why, for each of them."""


class ImageDecoder(ABC):
    """Decodes and resizes images. One thread at a time may use a decoder.

    Args:
        alpha: What becomes of transparency, see ``data.image_alpha``.
    """

    def __init__(self, alpha: Alpha = "white") -> None:
        self.alpha: Alpha = alpha
        self.failures: Counter[str] = Counter()
        """Images that became gray so far, by cause."""
        self.device = torch.device("cpu")
        """Where the pixels are made."""

    def decode(self, images: Sequence[bytes], size: int) -> DecodedImages:
        """Decode images and squash each to ``size`` x ``size``.

        Args:
            images: N encoded image files; N may be 0.
            size: Side of the result in pixels.
        """
        pixels = torch.empty(len(images), 3, size, size, dtype=torch.uint8, device=self.device)
        fast: dict[int, ImageHeader] = {}
        slow: list[int] = []
        failed: dict[int, str] = {}
        for index, data in enumerate(images):
            try:
                header = read_header(data)
            except ImageError as error:
                failed[index] = self._fail(error)
                continue
            if self._is_fast(header):
                fast[index] = header
            else:
                slow.append(index)
        if fast:
            slow += self._decode_fast(images, fast, size, pixels)
        for index in slow:
            try:
                pixels[index] = self._decode_slow(images[index], size)
            except ImageError as error:
                failed[index] = self._fail(error)
        order = sorted(failed)
        pixels[order] = GRAY
        return DecodedImages(pixels, order, [failed[index] for index in order])

    @abstractmethod
    def _is_fast(self, header: ImageHeader) -> bool:
        """Whether the fast path takes such an image."""

    @abstractmethod
    def _decode_fast(
        self, images: Sequence[bytes], headers: Mapping[int, ImageHeader], size: int, out: torch.Tensor
    ) -> list[int]:
        """Decode those of ``images`` that have a header into ``out``; return the indices that need PIL."""

    def _decode_slow(self, data: bytes, size: int) -> torch.Tensor:
        try:
            return _to_tensor(resize_with_pil(decode_with_pil(data, self.alpha), size)).to(self.device)
        except MemoryError:
            raise ImageError(OUT_OF_MEMORY) from None

    def _fail(self, error: ImageError) -> str:
        self.failures[error.cause] += 1
        logger.debug("image cannot be decoded: %s", error)
        return error.cause


class PilDecoder(ImageDecoder):
    """PIL for everything: slow, and the yardstick for the others."""

    def _is_fast(self, header: ImageHeader) -> bool:
        return False

    def _decode_fast(
        self, images: Sequence[bytes], headers: Mapping[int, ImageHeader], size: int, out: torch.Tensor
    ) -> list[int]:
        return list(headers)


class SimpleJpegDecoder(ImageDecoder):
    """libjpeg-turbo through simplejpeg, resized by torch in uint8: the fastest on a CPU."""

    def __init__(self, alpha: Alpha = "white") -> None:
        super().__init__(alpha)
        _require("simplejpeg", "simplejpeg")

    def _is_fast(self, header: ImageHeader) -> bool:
        return header.kind == "jpeg" and header.plain

    def _decode_fast(
        self, images: Sequence[bytes], headers: Mapping[int, ImageHeader], size: int, out: torch.Tensor
    ) -> list[int]:
        rescue = []
        for index in headers:
            try:
                out[index] = resize_with_torch(decode_jpeg(images[index]), size)
            except (ValueError, MemoryError, RuntimeError):  # torch has no MemoryError for its own allocations
                rescue.append(index)
        return rescue


def make_decoder(name: str = "auto", *, alpha: Alpha = "white", num_threads: int = 2) -> ImageDecoder:
    """Make a decoder.

    Args:
        name: ``dali``, ``simplejpeg``, ``pil``, or ``auto``: DALI where a GPU and DALI are, else simplejpeg, else PIL.
        alpha: What becomes of transparency, see ``data.image_alpha``.
        num_threads: CPU threads of DALI.

    Raises:
        ImportError: The decoder's library is not installed; the message says how to install it.
        UserError: There is no such decoder.
    """
    gpu = torch.cuda.is_available()
    if name == "auto":
        if gpu and _installed("nvidia.dali"):
            name = "dali"
        else:
            name = "simplejpeg" if _installed("simplejpeg") else "pil"
    if name == "pil":
        return PilDecoder(alpha)
    if name == "simplejpeg":
        return SimpleJpegDecoder(alpha)
    if name == "dali":
        _require("dali", "nvidia.dali")
        from megavlm.data.decode_dali import DaliDecoder  # noqa: PLC0415 - optional

        return DaliDecoder(torch.cuda.current_device() if gpu else None, num_threads, alpha)
    raise UserError(f"data.image_decoder must be auto, dali, simplejpeg or pil, not {name!r}")


def resize_with_pil(image: Image.Image, size: int) -> np.ndarray:
    """Squash an RGB image to [size, size, 3] uint8 with PIL's bicubic filter."""
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC))


def resize_with_torch(array: np.ndarray, size: int) -> torch.Tensor:
    """Squash [H, W, 3] uint8 to [3, size, size] with torch's antialiased bicubic filter, in uint8 throughout."""
    pixels = _to_tensor(array)[None]
    return torch.nn.functional.interpolate(pixels, (size, size), mode="bicubic", antialias=True, align_corners=False)[0]


def _to_tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).permute(2, 0, 1)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _require(name: str, module: str) -> None:
    if not _installed(module):
        raise ImportError(f"data.image_decoder {name} needs the package {module}: {_FIXES[name]}")
