"""What the first bytes of a JPEG, PNG or WebP file say, read without a decoder, in microseconds.

A decoder allocates what *its* reader of the file believes, so every size that is read here is compared with the
decoder's own before that may allocate (:mod:`megavlm.data.images`). Where files leave room for two opinions (two frame
headers, a marker whose length one reader skips and the other does not), they are refused.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from megavlm.config.errors import UserError

MAX_PIXELS = 40_000_000
"""Larger images are refused: they take more than 600 MB to decode."""
MAX_BYTES = 1 << 29
"""Larger files are refused unread: the largest picture within the limits has no more in any sound format."""
MAX_SIDE = 65_535
"""Longer sides are refused: a filter that shrinks one to a tile has hundreds of megabytes of weights."""
MAX_SCANS = 100
"""A progressive JPEG with more passes over the picture is refused: a few bytes each buy seconds of work."""

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD8)})
"""JPEG markers that have no length behind them."""
_SOI, _EOI, _SOS, _APP1, _APP14 = 0xD8, 0xD9, 0xDA, 0xE1, 0xEE
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_TEXT_WITH_METADATA = re.compile(rb"(?i)exif|xmp|app1")
_CHUNK_NAME = re.compile(rb"[A-Za-z]{4}")

_NOT_READ = (
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"%PDF", "PDF"),
    (b"8BPS", "Photoshop"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\x01\0", "icon"),
    (b"icns", "icon"),
    (b"\xd7\xcd\xc6\x9a", "Windows metafile"),
    (b"\x01\0\0\0", "Windows metafile"),
    (b"<svg", "SVG"),
)
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC or AVIF"}


class ImageError(UserError):
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
    """Whether a fast decoder gives the same as PIL: complete, 8 bits, gray or RGB, no palette, no alpha, and nothing
    that may turn it (EXIF, XMP)."""
    may_turn: bool = True
    """Whether there is metadata that may turn it; where there is none, this is its upright size."""


def check_size(width: int, height: int) -> None:
    """Refuse a size that no decoder may make.

    Raises:
        ImageError: It has no pixels, more than :data:`MAX_PIXELS`, or a side over :data:`MAX_SIDE`.
    """
    if width <= 0 or height <= 0:
        raise ImageError("broken header", f"{width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise ImageError("too large", f"{width} x {height} pixels, at most {MAX_PIXELS}")
    if max(width, height) > MAX_SIDE:
        raise ImageError("too large", f"{width} x {height} pixels, a side may have {MAX_SIDE}")


def scan(data: bytes) -> ImageHeader | None:
    """Read the header of a JPEG, PNG or WebP file; None for anything else. Its size is not checked.

    Raises:
        ImageError: It is empty, or its header is broken or ambiguous.
    """
    if not data:
        raise ImageError("empty")
    if len(data) > MAX_BYTES:
        raise ImageError("too large", f"{len(data):,} bytes, at most {MAX_BYTES:,}")
    if data[:3] == b"\xff\xd8\xff":
        return _scan_jpeg(data)
    if data[:8] == _PNG_MAGIC:
        return _scan_png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _scan_webp(data)
    return None


def name_of_unread(data: bytes) -> str:
    """Return the name of a known format that is not read here; nothing for what is unknown."""
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], "")
    start = data.lstrip()[:512] if data[:1].isspace() or data[:1] == b"<" else data
    if start[:5] == b"<?xml" and b"<svg" in start:
        return "SVG"
    return next((name for magic, name in _NOT_READ if start.startswith(magic)), "")


def _scan_jpeg(data: bytes) -> ImageHeader:
    """Walk the markers up to the first scan as libjpeg does (``jdmarker.c``)."""
    position, turned, progressive, adobe_transform = 2, False, False, None
    frame: tuple[int, int, int, int] | None = None
    while (position := data.find(b"\xff", position)) >= 0:
        while position < len(data) and data[position] == 0xFF:
            position += 1
        if position + 3 > len(data):
            break
        marker = data[position]
        position += 1
        if marker == 0 or marker in _STANDALONE:
            continue
        if marker in (_SOI, _EOI):
            raise ImageError("broken header", "JPEG that starts or ends again before its picture")
        (length,) = struct.unpack_from(">H", data, position)
        body = data[position + 2 : position + length]
        if marker in _SOF:
            if frame is not None:
                raise ImageError("broken header", "JPEG with two frame headers")
            if len(body) < 6:
                break
            frame = struct.unpack_from(">BHHB", body)
            progressive = marker in _PROGRESSIVE
        elif marker == _APP1:
            # PIL takes any number of EXIF segments, wherever they stand, and the orientation that XMP has.
            turned = turned or body.startswith(b"Exif") or (body.startswith(_XMP) and b"rientation" in body)
        elif marker == _APP14 and body.startswith(b"Adobe") and len(body) >= 12:
            adobe_transform = body[11]
        elif marker == _SOS and frame is not None:
            depth, height, width, components = frame
            if (progressive or body[:1] != bytes([components])) and data.count(b"\xff\xda", position) >= MAX_SCANS:
                raise ImageError("too large", f"JPEG with more than {MAX_SCANS} scans")
            complete = b"\xff\xd9" in data[-64:]
            plain = complete and depth == 8 and components in (1, 3) and not turned and adobe_transform != 0
            return ImageHeader("jpeg", width, height, plain, turned)
        if marker == _SOS or length < 2:
            break
        position += length
    if frame is None:
        raise ImageError("broken header", "JPEG without a frame header")
    return ImageHeader("jpeg", frame[2], frame[1], plain=False)  # cut: PIL says what it makes of it


def _scan_png(data: bytes) -> ImageHeader:
    """Walk all chunks: metadata that turns a picture may stand behind its pixels."""
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise ImageError("broken header", "PNG without IHDR")
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    position, plain, complete, turned = 8, depth == 8 and colour in (0, 2), False, False
    while position + 12 <= len(data) and not complete:
        (length,) = struct.unpack_from(">I", data, position)
        name = data[position + 4 : position + 8]
        if not _CHUNK_NAME.fullmatch(name):
            break  # not complete: PIL says what it makes of it
        if name == b"IHDR" and position != 8:
            raise ImageError("broken header", "PNG with two IHDR")
        if name in (b"tRNS", b"eXIf", b"acTL"):
            plain, turned = False, turned or name == b"eXIf"
        elif name in (b"tEXt", b"zTXt", b"iTXt"):
            keyword = data[position + 8 : position + 8 + min(length, 80)].split(b"\0")[0]
            if _TEXT_WITH_METADATA.search(keyword):
                plain, turned = False, True
        complete = name == b"IEND"
        position += 12 + length
    return ImageHeader("png", width, height, plain and complete, turned or not complete)


def _scan_webp(data: bytes) -> ImageHeader | None:
    """Return the size of the canvas: libwebp allocates two of them as soon as a file is opened."""
    name, body = data[12:16], data[20:34]
    if len(body) < 10:
        raise ImageError("broken header", "WebP that ends in its header")
    if name == b"VP8X":
        width, height = 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    elif name == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif name == b"VP8 ":
        width, height = (value & 0x3FFF for value in struct.unpack_from("<HH", body, 6))
    else:
        raise ImageError("broken header", "WebP without a picture")
    return ImageHeader("other", width, height, plain=False)
