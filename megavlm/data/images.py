"""What an encoded image file says about itself, read from its header in microseconds, and decoding with PIL.

The header decides which decoder may have the image: only sound, ordinary JPEG and PNG files go to a fast one,
because one bad image can lose a whole batch there.
"""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 40_000_000
"""Larger images are refused: 100 megapixels take more than 600 MB to decode."""

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class ImageError(ValueError):
    """An image that cannot be used; ``cause`` is a short name for counting."""

    def __init__(self, cause: str, detail: str = "") -> None:
        """Make the error; its text is the cause and the detail."""
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause


@dataclass(frozen=True)
class ImageHeader:
    """What the header says."""

    kind: str
    """``jpeg``, ``png`` or ``other``."""
    width: int
    """Pixels, before any EXIF rotation."""
    height: int
    """Pixels, before any EXIF rotation."""
    plain: bool
    """Whether a fast decoder gives the same as PIL: complete, 8 bits, gray or RGB, no palette, no alpha, no EXIF."""


def read_header(data: bytes) -> ImageHeader:
    """Read an image's header.

    Raises:
        ImageError: It is empty, no known image format, has no pixels, or more than :data:`MAX_PIXELS`.
    """
    if not data:
        raise ImageError("empty")
    if data[:3] == b"\xff\xd8\xff":
        header = _read_jpeg(data)
    elif data[:8] == _PNG_MAGIC:
        header = _read_png(data)
    else:
        header = _read_other(data)
    if header.width <= 0 or header.height <= 0:
        raise ImageError("broken header", f"{header.width} x {header.height} pixels")
    if header.width * header.height > MAX_PIXELS:
        raise ImageError("too large", f"{header.width} x {header.height} pixels, at most {MAX_PIXELS}")
    return header


def decode_with_pil(data: bytes) -> Image.Image:
    """Decode any image to 8-bit RGB, upright by its EXIF orientation; alpha is dropped, 16 bits become 8.

    Raises:
        ImageError: It cannot be decoded.
    """
    read_header(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = _open(data)
            image.load()
            image = ImageOps.exif_transpose(image)
            return image if image.mode == "RGB" else _eight_bits(image).convert("RGB")
        except ImageError:
            raise
        except Exception as error:
            # PIL raises whatever its plugins raise: OSError, SyntaxError, struct.error, EOFError, ...
            cause = "truncated" if "truncated" in str(error) else "decode error"
            raise ImageError(cause, f"{type(error).__name__}: {error}") from None


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:
        raise ImageError("too large") from None
    except Exception:
        raise ImageError("not an image") from None


def _eight_bits(image: Image.Image) -> Image.Image:
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image, np.float64)
    # PIL would clip 16-bit values to 255 instead of scaling them.
    scale = 257.0 if image.mode.startswith("I") and values.max(initial=0) > 255 else 1.0
    return Image.fromarray((values / scale).round().clip(0, 255).astype(np.uint8))


def _read_jpeg(data: bytes) -> ImageHeader:
    position, exif, adobe_transform = 2, False, None
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            break
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        length = struct.unpack_from(">H", data, position + 2)[0]
        if marker in _SOF and position + 10 <= len(data):
            depth, height, width, components = struct.unpack_from(">BHHB", data, position + 4)
            complete = b"\xff\xd9" in data[-64:]
            plain = complete and depth == 8 and components in (1, 3) and not exif and adobe_transform != 0
            return ImageHeader("jpeg", width, height, plain)
        if marker == 0xE1 and data[position + 4 : position + 8] == b"Exif":
            exif = True
        if marker == 0xEE and data[position + 4 : position + 9] == b"Adobe" and position + 16 <= len(data):
            adobe_transform = data[position + 15]
        if marker == 0xDA or length < 2:
            break
        position += 2 + length
    raise ImageError("broken header", "JPEG without a frame header")


def _read_png(data: bytes) -> ImageHeader:
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise ImageError("broken header", "PNG without IHDR")
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    complete = b"IEND" in data[-16:]
    odd_chunks = b"tRNS" in data[:4096] or b"eXIf" in data[:65536] or b"eXIf" in data[-65536:]
    return ImageHeader("png", width, height, complete and depth == 8 and colour in (0, 2) and not odd_chunks)


def _read_other(data: bytes) -> ImageHeader:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        width, height = _open(data).size
    return ImageHeader("other", width, height, plain=False)
