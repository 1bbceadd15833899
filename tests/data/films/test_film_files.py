"""Film files: their index without decoding them, and chosen frames, against PyAV's own loop over all of them."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest
from data_helpers import encode_image, smooth_image
from film_maker import decoded, film, frame

from megavlm.config.errors import MachineError
from megavlm.data.films import streams
from megavlm.data.films.container import in_order, write_frames
from megavlm.data.films.film import Film
from megavlm.data.films.header import read_index
from megavlm.data.films.index import FilmIndex
from megavlm.data.films.plan import FilmError
from megavlm.data.films.read import frames_of
from megavlm.data.films.source import FilePart
from megavlm.data.images import decode_with_pil

KINDS = [
    ("mp4", "libx264", "yuv420p"),
    ("mp4", "libx264", "yuv420p10le"),
    ("webm", "libvpx-vp9", "yuv420p"),
    ("matroska", "libx264", "yuv420p"),
    ("mov", "mpeg4", "yuv420p"),
    ("avi", "mpeg4", "yuv420p"),
    ("avi", "libx264", "yuv420p"),
    ("gif", "gif", "rgb8"),
    ("mpegts", "libx264", "yuv420p"),
]


def pixels(data: bytes | FilePart, indices: list[int], stored: bytes | None = None) -> list[np.ndarray]:
    return [one.permute(1, 2, 0).numpy() for one in frames_of(Film(data, stored), indices)]


@pytest.mark.parametrize(("kind", "codec", "depth"), KINDS)
def test_any_frames_are_those_of_the_whole_film(kind: str, codec: str, depth: str, tmp_path: Path) -> None:
    data = film(24, kind, codec, pixels=depth)
    (tmp_path / "shard").write_bytes(b"before" + data + b"behind")
    part = FilePart(str(tmp_path / "shard"), 6, len(data))
    index = read_index(part)
    assert index.shape() == (64, 48, 24, 10.0, 1, False)
    stored = index.to_bytes()
    assert stored == read_index(data).to_bytes() and FilmIndex.from_bytes(stored).shape() == index.shape()
    whole = decoded(data)
    assert len(whole) == 24
    for indices in ([*range(24)], [0, 7, 8, 22], [23], [3, 3, 4]):
        found = pixels(part, indices, stored)
        assert all(np.array_equal(one, whole[at]) for one, at in zip(found, indices, strict=True))


def test_frames_are_looked_up_from_the_key_frame_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    data, seen = film(60, every_key=6), []
    own = streams._decoded
    monkeypatch.setattr(streams, "_decoded", lambda *which: (seen.append(one) or one for one in own(*which)))
    read_index(data)
    assert len(seen) == 1  # its header's size, by the first frame
    seen.clear()
    stored = read_index(data).to_bytes()
    seen.clear()
    pixels(data, [2, 40, 59], stored)
    assert len(seen) <= 3 * 7 < 60


def test_a_stream_that_is_entered_anywhere_is_read_from_its_start() -> None:
    """FFmpeg seeks MPEG program streams by bytes, and goes on within a group of frames."""
    data = film(60, "mpeg", "mpeg2video", every_key=8, rate=25)
    whole, stored = decoded(data), read_index(data).to_bytes()
    assert all(np.array_equal(pixels(data, [at], stored)[0], whole[at]) for at in range(40, 60))


def test_a_turned_film_stands_upright() -> None:
    plain = decoded(film(3))
    for turn, quarters in ((90, 1), (180, 2), (-90, 3)):
        data = film(3, turn=turn)
        index = read_index(data)
        assert (index.width, index.height) == ((64, 48) if quarters == 2 else (48, 64))
        assert all(
            np.array_equal(one, np.rot90(of, quarters)) for one, of in zip(pixels(data, [0, 1, 2]), plain, strict=True)
        )


def test_a_mirrored_film_is_mirrored_back() -> None:
    data, (plain,) = film(1), decoded(film(1))
    at = data.index(b"tkhd") + 44  # ISO/IEC 14496-12, 8.3.2: the matrix of a track's header of version 0
    across = plain.transpose(1, 0, 2)
    for matrix, wanted in (
        ((-1, 0, 0, 1), plain[:, ::-1]), ((1, 0, 0, -1), plain[::-1]),
        ((0, 1, 1, 0), across), ((0, -1, -1, 0), across[::-1, ::-1]), ((0, 1, -1, 0), np.rot90(plain, 3)),
    ):  # fmt: skip
        a, b, c, d = (one << 16 for one in matrix)
        turned = data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :]
        index = read_index(turned)
        (shown,) = pixels(turned, [0])
        assert shown.shape == (index.height, index.width, 3) and np.array_equal(shown, wanted)


def test_a_varying_rate_goes_by_time() -> None:
    # Ten frames in the first second, then one that stands for two seconds, then ten more.
    times = [*range(0, 1000, 100), 1000, *range(3000, 4000, 100)]
    data = film(len(times), "matroska", times=times)
    index = read_index(data)
    assert index.frames == 21 and index.rate == pytest.approx(20 / 3.9)
    wanted = [round(second * index.rate) for second in (0, 0.5, 1.5, 2.5, 3.5)]
    seconds = [times[at] / 1000 for at in index.picked(wanted)]
    assert seconds == pytest.approx([0, 0.5, 1.0, 1.0, 3.5], abs=0.11)
    whole = decoded(data)
    found = pixels(data, wanted)
    assert all(np.array_equal(one, whole[at]) for one, at in zip(found, index.picked(wanted), strict=True))


def test_one_frame_is_a_film() -> None:
    index = read_index(film(1))
    assert index.frames == 1 and 0 < index.rate < 1000
    assert len(pixels(film(1), [0])) == 1


def cut(data: bytes, file: Path) -> bytes:
    """A film of which the last third is missing; what says where its frames are stands in front."""
    front = {"movflags": "faststart"}
    with av.open(str(file), "w", format="mp4", options=front) as out, av.open(io.BytesIO(data)) as source:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    return file.read_bytes()[: -len(data) // 3]


BROKEN = {
    "nothing": (b"", "empty"),
    "words": (b"these are words, and no film at all" * 20, "not a film"),
    "a playlist": (b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/hostname\n", "not a film"),
    "a list of files": (b"ffconcat version 1.0\nfile /etc/hostname\n", "not a film"),
    "a film without its end": (film(30, size=(128, 96))[:-900], "no pictures"),
    "a zip of others": (b"PK\x03\x04" + bytes(60), "not a film"),
    "sound alone": (film(0, sound=True), "no pictures"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_film_has_a_cause(name: str) -> None:
    data, cause = BROKEN[name]
    with pytest.raises(FilmError) as caught:
        read_index(data)
    assert caught.value.cause == cause and "\n" not in str(caught.value)


def test_a_cut_film_is_known_by_its_packets(tmp_path: Path) -> None:
    data = cut(film(60, size=(160, 120)), tmp_path / "whole.mp4")
    with pytest.raises(FilmError) as caught:
        read_index(data)
    assert caught.value.cause == "truncated"


def test_damage_within_is_one_bad_film_or_other_pixels_and_never_more_frames() -> None:
    data = bytearray(film(40, "matroska", size=(160, 120)))
    stored = read_index(bytes(data)).to_bytes()
    draw = np.random.default_rng(0)
    for _ in range(30):
        bad = bytearray(data)
        for at in draw.integers(400, len(bad), 30):
            bad[at] = int(draw.integers(256))
        try:
            found = pixels(bytes(bad), [0, 11, 39], stored)
        except FilmError as error:
            assert error.cause
        else:
            assert len(found) == 3 and all(one.shape == (120, 160, 3) for one in found)


def test_memory_does_not_grow_with_the_film(tmp_path: Path) -> None:
    peaks = []
    for frames in (40, 240):
        (tmp_path / "film").write_bytes(film(frames, size=(320, 240)))
        part = FilePart(str(tmp_path / "film"), 0, (tmp_path / "film").stat().st_size)
        tracemalloc.start()
        assert sum(1 for _ in frames_of(Film(part), range(frames))) == frames
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 10 * 320 * 240 * 3


def test_frames_one_by_one(tmp_path: Path) -> None:
    assert in_order(["f10.png", "f2.png", "f1.png"]) == ["f1.png", "f2.png", "f10.png"]
    files = [encode_image(smooth_image(seed, 60, 44), "PNG") for seed in range(5)]
    (tmp_path / "one.png").write_bytes(files[1])
    out = io.BytesIO()
    write_frames([files[0], tmp_path / "one.png", *files[2:]], 1.5, out)
    data = out.getvalue()
    again = io.BytesIO()
    write_frames(files, 1.5, again)
    assert again.getvalue() == data
    index = read_index(data)
    assert index.shape(2) == (60, 44, 5, 1.5, 2, True)
    found = pixels(data, [0, 1, 4])
    assert all(
        np.array_equal(one, np.array(decode_with_pil(files[at]))) for one, at in zip(found, (0, 1, 4), strict=True)
    )
    with pytest.raises(FilmError):
        write_frames([], 1.0, io.BytesIO())


def test_a_damaged_frame_is_a_bad_film() -> None:
    out = io.BytesIO()
    write_frames([encode_image(smooth_image(seed, 60, 44), "PNG") for seed in range(4)], 2.0, out)
    good = out.getvalue()
    for share, index_too in ((0.1, True), (0.6, False)):
        data = bytearray(good)
        data[int(len(data) * share)] ^= 0xFF
        with pytest.raises(FilmError, match=r"broken frame: frame \d is damaged"):
            pixels(bytes(data), [0, 1, 2, 3], None if index_too else read_index(good).to_bytes())


def test_a_small_zip_does_not_become_large() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("film.json", b'{"rate": 2}' + b" " * (16 << 20))
    tracemalloc.start()
    with pytest.raises(FilmError, match=r"film\.json is too large"):
        read_index(file.getvalue())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_transparency_is_white() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mov") as container:
        stream = container.add_stream("png", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "rgba"
        stream.codec_context.thread_count = 1
        clear = np.zeros((32, 32, 4), np.uint8)
        clear[:16] = (200, 0, 0, 255)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(clear, format="rgba")))
        container.mux(stream.encode(None))
    (shown,) = pixels(file.getvalue(), [0])
    assert shown[0, 0].tolist() == [200, 0, 0] and shown[-1, 0].tolist() == [255, 255, 255]


def test_a_broken_index_is_told() -> None:
    good = read_index(film(4)).to_bytes()
    for data in (b"", good[:-3], b"x" + good, good + good[:1] * 0 + b""):
        if data == good:
            continue
        with pytest.raises(FilmError, match="broken index"):
            FilmIndex.from_bytes(data)
    with pytest.raises(FilmError, match="broken index"):  # of another film
        pixels(film(2), [9], good)


def test_without_the_decoder_it_is_no_bad_film(monkeypatch: pytest.MonkeyPatch) -> None:
    data = film(2)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(MachineError, match=r"pip install 'megavlm\[video\]'"):
        read_index(data)


def test_the_maker_of_these_films_makes_what_it_says() -> None:
    assert np.abs(decoded(film(2))[1].astype(int) - frame(1)).mean() < 12
