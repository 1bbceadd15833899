"""The fuzzer of pictures finds nothing in the readers as they are, and does find what was wrong with them before."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import fuzz_images

from megavlm.data import images
from megavlm.data.decoders import make_decoder
from megavlm.data.images import ImageError, ImageHeader

COUNT = 250


def outcomes(name: str, count: int = COUNT, seed: int = 3) -> dict[int, fuzz_images.Outcome]:
    decoder = make_decoder(name)
    with fuzz_images.LowLimit():
        return {index: fuzz_images.try_case(decoder, seed, index) for index in range(count)}


def test_no_decoder_believes_another_size_or_turns_what_others_do_not() -> None:
    found = {name: outcomes(name) for name in ("pil", "simplejpeg")}
    counts, failures = fuzz_images.summarise(found)
    assert failures == []
    total = sum(counts.values(), start=type(next(iter(counts.values())))())
    assert total["cases"] == COUNT and total["decoded"] >= 60 and total["header refused"] >= 60
    assert total["equal in simplejpeg"] >= 60 and total["turned in simplejpeg"] == 0
    first = len(fuzz_images.known())
    for index, name in enumerate(fuzz_images.seeds(), first):
        outcome = found["simplejpeg"][index]
        assert bool(outcome.pixels) != (name in ("eps", "ico", "psd")), name
    assert not any(found["pil"][index].pixels for index in range(first))


def old_scan(data: bytes) -> ImageHeader | None:
    """The reader of JPEG as it was: every marker has a length, and nothing behind the first frame counts."""
    position = 2
    while data[:2] == b"\xff\xd8" and position + 10 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], struct.unpack_from(">H", data, position + 2)[0]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, position + 5)
            return ImageHeader("jpeg", width, height, plain=True)
        position += 2 + length
    return None if data[:2] != b"\xff\xd8" else (_ for _ in ()).throw(ImageError("broken header"))


def test_it_finds_two_readers_that_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "scan", old_scan)
    monkeypatch.setattr(images, "_ask_libjpeg", lambda *_: None)
    monkeypatch.setattr(fuzz_images, "known", dict)
    found = {name: outcomes(name, 300) for name in ("pil", "simplejpeg")}
    told = " ".join(fuzz_images.summarise(found)[1])
    assert "simplejpeg turns it, pil does not" in told
    monkeypatch.setattr(images, "decode_jpeg", lambda data: images.np.zeros((3000, 3000, 3), "uint8"))
    assert "libjpeg (3000, 3000)" in " ".join(fuzz_images.summarise({"pil": outcomes("pil", 60)})[1])


def test_the_command_counts_by_format(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert fuzz_images.main(["--count=50", "--decoders=pil", f"--save={tmp_path / 'failures'}"]) == 0
    printed = capsys.readouterr().out
    assert "pil: 50 cases in" in printed and "no failures" in printed and "\nall    50 cases, " in printed
    assert not (tmp_path / "failures").exists()
