"""All decoders see what PIL sees, and a bad image costs nobody but itself."""

import functools
import io
import struct

import numpy as np
import pytest
import torch
from data_helpers import encode_image, smooth_image
from PIL import Image, ImageOps

from megavlm.data import decode
from megavlm.data.decode import GRAY, ImageDecoder
from megavlm.data.decoders import make_decoder
from megavlm.data.images import ImageError, read_header

SIZE = 112


@pytest.fixture(params=["pil", "simplejpeg", "dali"])
def decoder(request: pytest.FixtureRequest) -> ImageDecoder:
    pytest.importorskip({"pil": "PIL", "dali": "nvidia.dali"}.get(request.param, request.param))
    return make_decoder(request.param)


def reference(data: bytes) -> np.ndarray:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


@functools.cache
def sound_images() -> dict[str, bytes]:
    image = smooth_image(1, 301, 203)
    exif = Image.Exif()
    exif[0x0112] = 6
    alpha = image.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(image.size))
    return {
        "jpeg": encode_image(image, quality=90),
        "jpeg 4:4:4": encode_image(image, quality=90, subsampling=0),
        "progressive": encode_image(image, progressive=True),
        "gray jpeg": encode_image(image.convert("L")),
        "cmyk jpeg": encode_image(image.convert("CMYK")),
        "rotated jpeg": encode_image(image, exif=exif),
        "tiny jpeg": encode_image(smooth_image(2, 3, 5)),
        "large jpeg": encode_image(smooth_image(3, 1500, 700)),
        "png": encode_image(image, "PNG"),
        "gray png": encode_image(image.convert("L"), "PNG"),
        "palette png": encode_image(image.quantize(64), "PNG"),
        "alpha png": encode_image(alpha, "PNG"),
        "one-bit png": encode_image(image.convert("1"), "PNG"),
        "gif": encode_image(image.quantize(64), "GIF"),
        "webp": encode_image(image, "WEBP", lossless=True),
        "bmp": encode_image(image, "BMP"),
    }


@functools.cache
def broken_images() -> dict[str, bytes]:
    jpeg, png = encode_image(smooth_image(4, 200, 150)), encode_image(smooth_image(4, 200, 150), "PNG")
    bomb = bytearray(png)
    bomb[16:24] = struct.pack(">II", 60000, 60000)
    noise = np.random.default_rng(0).bytes(2000)
    return {
        "empty": b"",
        "one byte": b"\xff",
        "html": b"<html>not found</html>",
        "cut jpeg": jpeg[: len(jpeg) // 2],
        "cut png": png[: len(png) // 2],
        "jpeg header only": jpeg[:20],
        "noise after a jpeg header": jpeg[:160] + noise + b"\xff\xd9",
        "noise": noise,
        "bomb": bytes(bomb),
        "zero wide": png[:16] + struct.pack(">II", 0, 5) + png[24:],
    }


def test_agrees_with_pil(decoder: ImageDecoder) -> None:
    images = sound_images()
    result = decoder.decode(list(images.values()), SIZE)
    assert result.failed == [] and not decoder.failures
    assert result.pixels.shape == (len(images), 3, SIZE, SIZE) and result.pixels.dtype == torch.uint8
    for (name, data), pixels in zip(images.items(), result.pixels.numpy(), strict=True):
        difference = np.abs(pixels.astype(int) - reference(data))
        assert difference.mean() < 0.6 and np.percentile(difference, 99.9) <= 4, (name, difference.mean())


def test_bad_images_turn_gray_and_leave_the_others_alone(decoder: ImageDecoder) -> None:
    sound, broken = list(sound_images().values()), list(broken_images().values())
    alone = decoder.decode(sound, SIZE).pixels
    mixed = [item for pair in zip(sound, broken, strict=False) for item in pair]
    result = decoder.decode(mixed, SIZE)
    assert result.failed == list(range(1, len(mixed), 2))
    assert torch.equal(result.pixels[::2], alone[: len(broken)])
    assert (result.pixels[1::2] == GRAY).all()
    assert sum(decoder.failures.values()) == len(broken)
    assert {"empty", "not an image", "too large", "broken header"} <= set(decoder.failures)
    assert torch.equal(decoder.decode(sound, SIZE).pixels, alone)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    data = encode_image(Image.fromarray(ramp), "PNG")
    pixels = make_decoder("pil").decode([data], 64).pixels.numpy()
    assert np.abs(pixels[0, 0] - ramp / 257.0).max() < 1


def test_no_images_and_other_sizes(decoder: ImageDecoder) -> None:
    assert decoder.decode([], SIZE).pixels.shape == (0, 3, SIZE, SIZE)
    data = encode_image(smooth_image(5, 40, 40))
    assert decoder.decode([data] * 40, 14).pixels.shape == (40, 3, 14, 14)
    assert decoder.decode([data], 28).pixels.shape == (1, 3, 28, 28)


def test_a_dali_exception_costs_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvidia.dali")
    decoder = make_decoder("dali")
    # A file that looks plain and is not: DALI raises for the whole batch.
    bad = encode_image(smooth_image(4, 200, 150))[:160] + b"\x00" * 500 + b"\xff\xd9"
    good = encode_image(smooth_image(6, 90, 80))
    result = decoder.decode([good, bad, good], SIZE)
    assert result.failed in ([], [1])
    assert np.abs(result.pixels[0].numpy().astype(int) - reference(good)).mean() < 0.6
    assert torch.equal(result.pixels[0], result.pixels[2])
    monkeypatch.setattr(decoder, "_squash", lambda *_: (_ for _ in ()).throw(RuntimeError("boom")))
    assert decoder.decode([good, good], SIZE).failed == [] and decoder.rebuilds >= 1


def test_missing_library_and_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="must be auto, dali, simplejpeg or pil"):
        make_decoder("opencv")
    monkeypatch.setattr(decode, "installed", lambda _: False)
    for name, fix in [("simplejpeg", "pip install simplejpeg"), ("dali", "pip install nvidia-dali")]:
        with pytest.raises(ImportError, match=fix):
            make_decoder(name)
    assert type(make_decoder("auto")).__name__ == "PilDecoder"


def test_headers_tell_plain_images_from_odd_ones() -> None:
    plain = {name: read_header(data).plain for name, data in sound_images().items()}
    assert {name for name, is_plain in plain.items() if is_plain} == {
        *("jpeg", "jpeg 4:4:4", "progressive", "gray jpeg", "tiny jpeg", "large jpeg", "png", "gray png")
    }
    with pytest.raises(ImageError, match="too large"):
        read_header(broken_images()["bomb"])
