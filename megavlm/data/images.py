"""The one place where a picture is opened: its size by every reader that has a say, its pixels by PIL.

The header decides which decoder may have the image: only sound, ordinary JPEG and PNG files go to a fast one,
because one bad image can lose a whole batch there. Before anything allocates pixels, the size must be within the
limits in the words of each reader: ours, PIL's, and for JPEG libjpeg's own.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image

from megavlm.data.films.plan import HasFilmShape
from megavlm.data.image_colours import Alpha, to_rgb
from megavlm.data.image_header import (
    MAX_BYTES,
    MAX_PIXELS,
    ImageError,
    ImageHeader,
    check_size,
    name_of_unread,
    scan,
)
from megavlm.data.media import ImageLayout, ImagePlan, ImageRuns, TokenGrid, plan_of
from megavlm.data.plans_single import SquashPlan
from megavlm.data.positions import own_grids

if TYPE_CHECKING:
    from megavlm.config.schema import ModelConfig

__all__ = [
    "FORMATS",
    "MAX_BYTES",
    "MAX_PIXELS",
    "OUT_OF_MEMORY",
    "Geometry",
    "ImageError",
    "ImageHeader",
    "decode_jpeg",
    "decode_with_pil",
    "geometry",
    "image_grids",
    "image_runs",
    "lay_out",
    "read_header",
    "upright_size",
]

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
"""PIL's plugins that may see a stranger's file. Others start programs (EPS: Ghostscript), or decoders that allocate by
headers which nobody here can check (AVIF, JPEG 2000)."""
OUT_OF_MEMORY = "out of memory"
"""Cause of an image within the limits that this machine had no memory for."""

_METHODS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TILE_WIDTH, _TILE_LENGTH, _SAMPLES = 322, 323, 277  # tags of TIFF


def _import_simplejpeg() -> ModuleType | None:
    try:
        import simplejpeg  # noqa: PLC0415 - its decoder is optional
    except ImportError:
        return None
    return simplejpeg


_SIMPLEJPEG = _import_simplejpeg()


def read_header(data: bytes) -> ImageHeader:
    """Read an image's header.

    Raises:
        ImageError: It is empty, of no format in :data:`FORMATS`, or its size is out of bounds or in doubt.
    """
    header = scan(data)
    if header is None or header.kind == "other":
        if header is not None:
            check_size(header.width, header.height)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            width, height = _open(data).size
        return ImageHeader("other", width, height, plain=False)
    check_size(header.width, header.height)
    if header.kind == "jpeg":
        _ask_libjpeg(data, header)
    return header


def decode_with_pil(data: bytes, alpha: Alpha = "white") -> Image.Image:
    """Decode any image to 8-bit RGB, upright by its EXIF or XMP orientation; 16 bits become 8.

    Args:
        data: The file.
        alpha: What becomes of transparency, see :func:`megavlm.data.image_colours.to_rgb`.

    Raises:
        ImageError: It cannot be decoded, or not in the memory that there is.
    """
    header = read_header(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = _open(data)
            if header.kind != "other" and image.size != (header.width, header.height):
                raise _doubt(header, *image.size)
            image.load()
            turned = _METHODS.get(_orientation_of(image))
            rgb = to_rgb(image, alpha)
            return rgb if turned is None else rgb.transpose(turned)
        except ImageError:
            raise
        except MemoryError:
            raise ImageError(OUT_OF_MEMORY, f"{header.width} x {header.height} pixels") from None
        except Exception as error:
            # PIL raises whatever its plugins raise: OSError, SyntaxError, struct.error, EOFError, ...
            cause = "truncated" if "truncated" in str(error) else "decode error"
            raise ImageError(cause, f"{type(error).__name__}: {error}") from None


def decode_jpeg(data: bytes) -> np.ndarray:
    """Decode a plain JPEG (:attr:`ImageHeader.plain`) with libjpeg-turbo to [H, W, 3] uint8 RGB.

    Raises:
        UserError: It is damaged.
        MemoryError: There is no room for its pixels.
    """
    assert _SIMPLEJPEG is not None
    pixels: np.ndarray = _SIMPLEJPEG.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
    return pixels


@dataclass(frozen=True)
class Geometry:
    """How a picture's pixels are stored."""

    width: int
    height: int
    turn: int
    """How they are to be turned, 1 (not at all) to 8, as EXIF counts."""


def geometry(data: bytes) -> Geometry:
    """Return a picture's stored size, and how it is to be turned; decodes it only where nothing else tells (PNG).

    Raises:
        ImageError: It cannot be opened.
    """
    read_header(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _open(data)
        width, height = image.size
        tags = getattr(image, "tag_v2", None)
        if tags is None:
            return Geometry(width, height, _orientation_of(image))
        # PIL turns a TIFF as it loads it, and says its upright size before.
        turn = _valid(tags.get(ExifTags.Base.Orientation))
        return Geometry(height, width, turn) if turn >= 5 else Geometry(width, height, turn)


def upright_size(data: bytes) -> tuple[int, int]:
    """Return width and height of a picture as a person sees it, turned by EXIF or XMP.

    From its header alone, but for a PNG with such metadata, which may stand behind its pixels.

    Raises:
        ImageError: It cannot be opened, or its size is out of bounds or in doubt.
    """
    header = read_header(data)
    if not header.may_turn:
        return header.width, header.height
    stored = geometry(data)
    return (stored.height, stored.width) if stored.turn >= 5 else (stored.width, stored.height)


def lay_out(files: Sequence[bytes | HasFilmShape], plan: ImagePlan) -> list[ImageLayout]:
    """Return the layouts of the pictures and films of one conversation, from their headers.

    Raises:
        ImageError: One cannot be opened, its size is out of bounds or in doubt, or the plan cannot have it; of a film a
            :class:`FilmError`.
    """
    found: list[ImageLayout] = []
    for number, data in enumerate(files, 1):
        try:
            if not isinstance(data, bytes):
                found.append(plan.of(data.shape(len(files))))
                continue
            if isinstance(plan, SquashPlan):  # whichever way up
                header = read_header(data)
                size = header.width, header.height
            else:
                size = upright_size(data)
            found.append(plan.plan(*size, len(files)))
        except ImageError as error:
            what = "image" if isinstance(data, bytes) else "film"
            raise type(error)(error.cause, f"{what} {number}: {error}") from None
    return found


def image_runs(plan: ImagePlan, count: int, files: Callable[[], Sequence[bytes | HasFilmShape]]) -> list[ImageRuns]:
    """Return what stands in a prompt for each of its pictures and films.

    Args:
        plan: What becomes of them.
        count: Pictures of the prompt.
        files: Returns these; their headers are not read where the plan does the same with all.

    Raises:
        ImageError: As :func:`lay_out`.
    """
    if plan.fixed and (plan.films is None or not _with_films(files())):
        return [plan.plan(plan.side, plan.side).runs] * count
    return [layout.runs for layout in lay_out(files(), plan)]


def image_grids(
    model: ModelConfig, count: int, files: Callable[[], Sequence[bytes | HasFilmShape]]
) -> tuple[TokenGrid, ...]:
    """Return how the slots of a prompt's pictures lie, where the model's positions have rows and columns; else none.

    Args:
        model: The model.
        count: Pictures of the prompt.
        files: Returns these; their headers are not read where they do not matter.

    Raises:
        ImageError: As :func:`lay_out`.
    """
    if model.language.position_axes == 1:
        return ()
    plan = plan_of(model)
    alike = plan.fixed and not _with_films(files())
    return own_grids(model, [plan.plan(plan.side, plan.side)] * count if alike else lay_out(files(), plan))


def _with_films(files: Sequence[bytes | HasFilmShape]) -> bool:
    return not all(isinstance(one, bytes) for one in files)


def _orientation_of(image: Image.Image) -> int:
    try:
        return _valid(image.getexif().get(ExifTags.Base.Orientation))
    except MemoryError:
        raise
    except Exception:
        return 1  # metadata that nobody can read turns nothing


def _valid(found: object) -> int:
    return found if isinstance(found, int) and found in _METHODS else 1


def _open(data: bytes) -> Image.Image:
    """Open an image without decoding it.

    Raises:
        ImageError: PIL does not know it, or it is too large in PIL's words.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ImageError("too large") from None
    except MemoryError:
        raise ImageError(OUT_OF_MEMORY) from None
    except Exception:
        known = name_of_unread(data)
        if known:
            raise ImageError("format not read", f"{known} is not read; convert it to PNG or JPEG") from None
        raise ImageError("not an image") from None
    check_size(*image.size)
    if image.format == "TIFF":
        _check_tiles(image)
    return image


def _check_tiles(image: Image.Image) -> None:
    """A small TIFF may be cut from tiles of any size, and libtiff makes a whole one."""
    tags = getattr(image, "tag_v2", {})
    width, length, samples = (tags.get(tag, 1) for tag in (_TILE_WIDTH, _TILE_LENGTH, _SAMPLES))
    if not all(isinstance(value, int) and value > 0 for value in (width, length, samples)):
        raise ImageError("broken header", "TIFF with tiles of no size")
    if width * length > MAX_PIXELS or samples > 64:
        raise ImageError("too large", f"TIFF with tiles of {width} x {length} pixels and {samples} samples")


def _ask_libjpeg(data: bytes, header: ImageHeader) -> None:
    if _SIMPLEJPEG is None:
        return
    try:
        height, width = _SIMPLEJPEG.decode_jpeg_header(data, strict=False)[:2]
    except MemoryError:
        raise ImageError(OUT_OF_MEMORY) from None
    except Exception:
        return  # sampling that its interface has no name for, or nothing that libjpeg decodes: PIL says
    if (width, height) != (header.width, header.height):
        raise _doubt(header, width, height)


def _doubt(header: ImageHeader, width: int, height: int) -> ImageError:
    sizes = f"{header.width} x {header.height} or {width} x {height}"
    return ImageError("broken header", f"{sizes} pixels, by who reads it")
