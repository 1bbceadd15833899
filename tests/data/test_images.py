"""Pictures from strangers: what may be opened, how large it may be in whose words, and what a person would see."""

from __future__ import annotations

import ast
import io
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import encode_image, smooth_image
from PIL import Image, ImageOps

import megavlm
from megavlm.data import decode, images
from megavlm.data.decode import GRAY, ImageDecoder
from megavlm.data.decoders import make_decoder
from megavlm.data.image_header import MAX_SIDE, scan
from megavlm.data.images import FORMATS, OUT_OF_MEMORY, ImageError, decode_with_pil, read_header

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import fuzz_images

SIZE = 16
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'


@pytest.fixture(params=["pil", "simplejpeg", "dali"])
def decoder(request: pytest.FixtureRequest) -> ImageDecoder:
    pytest.importorskip({"pil": "PIL", "dali": "nvidia.dali"}.get(request.param, request.param))
    return make_decoder(request.param)


def corners() -> Image.Image:
    """Wider than high, and no turn or mirror image of it looks like it."""
    image = Image.new("RGB", (64, 32))
    for colour, box in (((255, 0, 0), (0, 0, 32, 16)), ((0, 255, 0), (32, 0, 64, 16)), ((0, 0, 255), (0, 16, 32, 32))):
        image.paste(colour, box)
    return image


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def seen(decoder: ImageDecoder, data: bytes, size: int = SIZE) -> np.ndarray:
    result = decoder.decode([data], size)
    assert not result.failed, result.causes
    return result.pixels[0].permute(1, 2, 0).numpy()


# Sizes


def test_no_reader_is_believed_alone() -> None:
    for name, data in fuzz_images.known().items():
        with pytest.raises(ImageError) as caught:
            decode_with_pil(data)
        # Junk in front of the markers: that is no JPEG for anyone.
        wanted = ("not an image",) if name == "jpeg junk before markers" else ("too large", "broken header")
        assert caught.value.cause in wanted, (name, caught.value)


def test_libjpeg_is_asked_before_it_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where our own reader of the markers were wrong: the files of the fault, with that reader blinded."""
    wrong = images.ImageHeader("jpeg", 16, 16, plain=True)
    monkeypatch.setattr(images, "scan", lambda data: wrong if data[:2] == b"\xff\xd8" else scan(data))
    huge = fuzz_images.resized_jpeg(encode_image(corners()), 6000, 6000)
    decoder = make_decoder("simplejpeg")
    result = decoder.decode([huge, fuzz_images.known()["jpeg jumps to a comment"]], SIZE)
    assert result.causes == ["broken header"] * 2
    monkeypatch.setattr(images, "_SIMPLEJPEG", None)  # and PIL's reader where libjpeg cannot be asked
    with pytest.raises(ImageError, match="16 x 16 or 6000 x 6000 pixels"):
        decode_with_pil(huge)


def test_sides_tiles_scans_and_bytes_are_limited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    line = encode_image(Image.new("L", (MAX_SIDE + 1, 1)), "PNG")
    with pytest.raises(ImageError, match="a side may have 65535"):
        read_header(line)
    with pytest.raises(ImageError, match="tiles of 60000 x 60000"):
        read_header(fuzz_images.known()["tiff tiles"])
    progressive = encode_image(corners(), progressive=True)
    read_header(progressive)
    scans = progressive[:-2] + b"\xff\xda\x00\x08\x01\x01\x00\x01\x01\x00" * 200
    with pytest.raises(ImageError, match="more than 100 scans"):
        read_header(scans)
    monkeypatch.setattr("megavlm.data.image_header.MAX_BYTES", len(line) - 1)
    with pytest.raises(ImageError, match="too large: "):
        read_header(line)


def test_dali_never_holds_more_pixels_than_one_picture_may_have() -> None:
    pytest.importorskip("nvidia.dali")
    from megavlm.data.decode_dali import _MAX_BATCH, _batches

    def header(width: int) -> images.ImageHeader:
        return images.ImageHeader("jpeg", width, 6000, plain=True)

    large = {i: header(3000 if i % 2 else 6000) for i in range(6)}
    assert list(_batches(large)) == [[0], [1], [2], [3], [4], [5]]
    assert list(_batches({0: header(3000), 1: header(3000), 2: header(1000)})) == [[0, 1], [2]]
    small = {i: header(1) for i in range(2 * _MAX_BATCH + 1)}
    assert [len(part) for part in _batches(small)] == [_MAX_BATCH, _MAX_BATCH, 1]
    assert [i for part in _batches(large) for i in part] == list(large)


@pytest.mark.parametrize("name", ["pil", "simplejpeg"])
def test_a_picture_that_memory_is_too_small_for_costs_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    good, large = encode_image(corners()), encode_image(smooth_image(1, 300, 200))
    real_open, real_jpeg = images._open, images.decode_jpeg

    def opened(data: bytes) -> Image.Image:
        image = real_open(data)
        if data == large:
            monkeypatch.setattr(image, "load", lambda: (_ for _ in ()).throw(MemoryError))
        return image

    def jpeg(data: bytes) -> np.ndarray:
        if data == large:
            raise MemoryError
        return real_jpeg(data)

    decoder = make_decoder(name)
    alone = decoder.decode([good], SIZE).pixels[0]
    monkeypatch.setattr(images, "_open", opened)
    monkeypatch.setattr(decode, "decode_jpeg", jpeg)
    result = decoder.decode([good, large, good], SIZE)
    assert (result.failed, result.causes) == ([1], [OUT_OF_MEMORY])
    assert (result.pixels[1] == GRAY).all()
    assert torch.equal(result.pixels[0], alone) and torch.equal(result.pixels[2], alone)
    monkeypatch.setattr(decode, "render_with_pil", lambda *_: (_ for _ in ()).throw(MemoryError))
    assert make_decoder("pil").decode([good], SIZE).causes == [OUT_OF_MEMORY]


# In a process of its own: what others have freed in this one would do for a picture.
SMALL_MACHINE = """
import io, resource, sys
from pathlib import Path
from PIL import Image
from megavlm.data.decoders import make_decoder

def encode(size):
    file = io.BytesIO()
    Image.new("RGB", size, (9, 99, 199)).save(file, "JPEG")
    return file.getvalue()

good, large = encode((64, 32)), Path(sys.argv[1]).read_bytes()
names, found = ("pil", "simplejpeg"), []
for name in names:
    decoder = make_decoder(name)
    alone = decoder.decode([good], 16).pixels[0]
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (60 << 20), resource.RLIM_INFINITY))
    result = decoder.decode([good, large, good], 16)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    same = bool((result.pixels[0] == alone).all() and (result.pixels[2] == alone).all())
    found.append((name, result.failed, result.causes, same))
# Only now: what a whole one leaves behind would do for the next decoder.
for row, name in zip(found, names):
    print(*row, make_decoder(name).decode([large], 16).failed)
"""


def test_so_it_does_where_memory_really_ends(tmp_path: Path) -> None:
    (tmp_path / "large.jpg").write_bytes(encode_image(Image.new("RGB", (6000, 6000), (9, 99, 199))))
    command = [sys.executable, "-c", SMALL_MACHINE, str(tmp_path / "large.jpg")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout
    assert printed.splitlines() == [f"{name} [1] ['out of memory'] True []" for name in ("pil", "simplejpeg")]


# Formats


def test_only_formats_of_the_list_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An EPS that is called a picture would start Ghostscript."""
    started = tmp_path / "started"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {started}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
    image = corners()
    refused = {
        "PostScript": eps,
        "icon": encode_image(image, "ICO"),
        "JPEG 2000": encode_image(image, "JPEG2000"),
        "Photoshop": fuzz_images.seeds()["psd"],
        "PDF": encode_image(image, "PDF"),
        "AVIF": b"\0\0\0\x20ftypavif" + bytes(40),
        "HEIC": b"\0\0\0\x20ftypheic" + bytes(40),
        "SVG": b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>",
    }
    for name, data in refused.items():
        for call in (read_header, decode_with_pil, images.geometry):
            with pytest.raises(ImageError, match=f"format not read: {name} is not read; convert it to PNG or JPEG"):
                call(data)
    for kind in ("SGI", "TGA", "PCX", "IM", "DDS"):
        with pytest.raises(ImageError, match="not an image"):
            decode_with_pil(encode_image(image, kind))
    assert not started.exists()
    for kind in FORMATS:
        assert decode_with_pil(encode_image(image, kind)).size == image.size


def test_nothing_else_opens_pictures() -> None:
    """PIL's plugins are chosen in one place; the package has no other call of Image.open."""
    package = Path(megavlm.__file__).parent
    calls = [
        path.relative_to(package).as_posix()
        for path in sorted(package.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "open" and ast.unparse(node.value).endswith("Image")
    ]
    assert calls == ["data/images.py"]


# Colours


def ring(mode: str) -> Image.Image:
    """A black square that is seen only in the middle."""
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (8, 8, 24, 24))
    return image.convert(mode)


def transparent() -> dict[str, bytes]:
    palette = ring("RGBA").quantize(4)
    gray = Image.new("L", (32, 32), 7)
    gray.paste(0, (8, 8, 24, 24))
    colour = Image.new("RGB", (32, 32), (9, 9, 9))
    colour.paste((0, 0, 0), (8, 8, 24, 24))
    sixteen = np.full((32, 32), 300, np.uint16)
    sixteen[8:24, 8:24] = 0
    return {
        "rgba png": encode_image(ring("RGBA"), "PNG"),
        "la png": encode_image(ring("LA"), "PNG"),
        "palette png": encode_image(palette, "PNG"),
        "gray png with a colour": encode_image(gray, "PNG", transparency=7),
        "rgb png with a colour": encode_image(colour, "PNG", transparency=(9, 9, 9)),
        "16-bit png with a colour": encode_image(Image.fromarray(sixteen), "PNG", transparency=300),
        "gif": encode_image(ring("RGBA"), "GIF"),
        "webp": encode_image(ring("RGBA"), "WEBP", lossless=True),
        "tiff": encode_image(ring("RGBA"), "TIFF"),
    }


def test_what_is_transparent_is_white(decoder: ImageDecoder) -> None:
    for name, data in transparent().items():
        pixels = seen(decoder, data)
        assert (pixels[0, 0] >= 250).all() and (pixels[SIZE // 2, SIZE // 2] <= 5).all(), (name, pixels[0, 0])
    dropping = make_decoder("pil", alpha="drop")
    for name, data in transparent().items():
        whole = Image.open(io.BytesIO(data))
        if not whole.mode.startswith("I"):
            assert (seen(dropping, data, 32) == np.asarray(whole.convert("RGB"))).all(), name


def test_half_transparent_is_mixed() -> None:
    data = encode_image(Image.new("RGBA", (4, 4), (255, 0, 0, 128)), "PNG")
    assert decode_with_pil(data).getpixel((0, 0)) == (255, 127, 127)
    assert decode_with_pil(data, "drop").getpixel((0, 0)) == (255, 0, 0)


def gray(values: np.ndarray, kind: str = "TIFF", **options: object) -> np.ndarray:
    pixels = np.asarray(decode_with_pil(encode_image(Image.fromarray(values), kind, **options)))
    assert (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()
    return pixels[..., 0].astype(int)


def test_numbers_have_the_white_of_their_own_bits() -> None:
    ramp = np.linspace(0, 1, 256).reshape(16, 16)
    eight = (ramp * 255).round().astype(int)
    dark = (ramp * 250).astype(np.uint16)  # of 65535: black to the eye
    for kind in ("PNG", "TIFF", "PPM"):
        assert gray(dark, kind).max() <= 1, kind
        assert np.abs(gray((ramp * 65535).astype(np.uint16), kind) - eight).max() <= 1, kind
    shares, bytes_ = (ramp * factor for factor in (1, 255))
    for values in (shares, bytes_, ramp * 65535, ramp * 5e6, ramp * 2 - 1):
        assert np.abs(gray(values.astype(np.float32)) - eight).max() <= 1, values.max()
    assert np.abs(gray((ramp * 2**31 * 0.99).astype(np.int32)) - eight).max() <= 1
    assert np.abs(gray((ramp * 255).astype(np.int32)) - eight).max() <= 1
    holes = shares.astype(np.float32)
    holes[0, 0], holes[0, 1] = np.nan, np.inf
    assert np.abs(gray(holes) - eight)[1:].max() <= 1
    assert (gray(np.zeros((4, 4), np.float32)) == 0).all()
    # Where zero is white, PIL turns pictures of 8 bits round, and no others.
    assert np.abs(gray((ramp * 65535).astype(np.uint16), tiffinfo={262: 0}) - (255 - eight)).max() <= 1


def test_other_modes_are_as_pil_has_them() -> None:
    image = smooth_image(5, 40, 30)
    files = [
        encode_image(image.convert("CMYK")),
        encode_image(image.convert("CMYK"), "TIFF"),
        encode_image(image.convert("1"), "TIFF"),
        encode_image(image.convert("1"), "PNG"),
        encode_image(image.convert("1"), "BMP"),
        encode_image(image.quantize(7), "BMP"),
        encode_image(image.convert("YCbCr"), "TIFF"),
    ]
    for data in files:
        assert (np.asarray(decode_with_pil(data)) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


# Geometry


def turned(orientation: int) -> dict[str, bytes]:
    image, exif, xmp = corners(), exif_of(orientation), XMP % orientation
    jpeg = encode_image(image, quality=95, subsampling=0)
    first_scan = jpeg.find(b"\xff\xda")
    png = encode_image(image, "PNG")
    behind = fuzz_images.png_chunk(b"eXIf", exif.tobytes()[6:])
    text = f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n".encode()
    profile = fuzz_images.png_chunk(b"tEXt", b"Raw profile type exif\0" + text)
    return {
        "jpeg exif": encode_image(image, quality=95, subsampling=0, exif=exif),
        "jpeg xmp": encode_image(image, quality=95, subsampling=0, xmp=xmp),
        "jpeg exif behind its frame": jpeg[:first_scan]
        + fuzz_images.jpeg_segment(0xE1, exif.tobytes())
        + jpeg[first_scan:],
        "png exif": encode_image(image, "PNG", exif=exif),
        "png exif behind its pixels": png[:-12] + behind + png[-12:],
        "png xmp": png[:33] + fuzz_images.png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp) + png[33:],
        "png profile": png[:33] + profile + png[33:],
        "webp exif": encode_image(image, "WEBP", lossless=True, exif=exif),
        "tiff": encode_image(image, "TIFF", tiffinfo={0x0112: orientation}),
    }


@pytest.mark.parametrize("orientation", [2, 3, 5, 6, 8])
def test_all_decoders_turn_pictures_the_same_way(orientation: int, decoder: ImageDecoder) -> None:
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(encode_image(corners(), "PNG", exif=exif_of(orientation)))))
    upright = np.asarray(wanted.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(int)
    for name, data in turned(orientation).items():
        assert np.abs(seen(decoder, data).astype(int) - upright).mean() < 3, name
        assert decode_with_pil(data).size == wanted.size, name
        found = images.geometry(data)
        assert (found.width, found.height, found.turn) == (64, 32, orientation), name


def test_metadata_that_nobody_can_read_costs_no_picture(decoder: ImageDecoder) -> None:
    image = corners()
    jpeg = encode_image(image, quality=95, subsampling=0)
    plain = seen(decoder, jpeg).astype(int)
    for body in (b"Exif\0\0" + b"\xff" * 30, b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", XMP % 9):
        data = jpeg[:2] + fuzz_images.jpeg_segment(0xE1, body) + jpeg[2:]
        assert np.abs(seen(decoder, data).astype(int) - plain).mean() < 2


def test_headers_say_what_fast_decoders_may_have() -> None:
    for name, data in turned(6).items():
        assert not read_header(data).plain, name
    for data in transparent().values():
        assert not read_header(data).plain
    jpeg = encode_image(corners())
    xmp = fuzz_images.jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>")
    assert read_header(jpeg[:2] + xmp + jpeg[2:]).plain, "most photographs have XMP, and it says nothing of turning"
    assert struct.unpack(">H", jpeg[4:6])[0] < len(jpeg)
