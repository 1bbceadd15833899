"""Every kind of bad data on real shards: it costs that sample only, it is counted and listed, and nothing shifts."""

from __future__ import annotations

import json
import shutil
import sqlite3
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from data_helpers import TOKENS_PER_IMAGE, encode_image, open_reader, smooth_image, write_raw
from PIL import Image

from megavlm.data.batch import IGNORE_INDEX, Pack, SkippedSample
from megavlm.data.decode import GRAY, PilDecoder
from megavlm.data.decoders import make_decoder
from megavlm.data.feed import Prefetcher
from megavlm.data.plans_single import SquashPlan
from megavlm.data.quarantine import Quarantine, read_list
from megavlm.data.read_pack import ReadPack
from megavlm.data.schema import UnsafePathError, parse_conversation
from megavlm.data.shard_reader import BROKEN, CUT, NO_INDEX
from megavlm.data.tokenizer import Tokenizer

SIZE = 16
GOOD = 12


def record(text: str = "red square.", images: int = 1, path: str = "a.jpg") -> bytes:
    prompt = "".join(f"Picture {i + 1}: <img>{path}</img>\n" for i in range(images))
    turns = [{"from": "user", "value": f"{prompt}how many?"}, {"from": "assistant", "value": text}]
    return json.dumps({"id": "x", "conversations": turns}).encode()


def photograph(seed: int = 1) -> bytes:
    return encode_image(smooth_image(seed, 40, 30))


def good(i: int) -> dict[str, bytes]:
    return {"json": record(f"red square {'left ' * i}."), "img0": photograph(i)}


def png_bomb() -> bytes:
    """A small file that claims 60000 x 60000 pixels."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    body = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return body + struct.pack(">I", 0) + b"IDAT" + bytes(4) + struct.pack(">I", 0) + b"IEND" + bytes(4)


def bad_images() -> dict[str, bytes]:
    whole = encode_image(smooth_image(1, 200, 150))
    return {
        "bad image (truncated)": whole[: len(whole) // 2],
        "bad image (empty)": b"",
        "bad image (not an image)": b"GIFT" + whole[4:],
        "bad image (too large)": png_bomb(),
        "bad image (broken header)": whole[:3],
    }


def odd_images() -> dict[str, bytes]:
    """What looks bad and is not: it is trained on."""
    image = smooth_image(2, 40, 30)
    sixteen = Image.fromarray((np.arange(1200, dtype=np.uint16) * 50).reshape(30, 40))
    frames = [smooth_image(i, 40, 30).convert("P") for i in range(3)]
    return {
        "cmyk": encode_image(image.convert("CMYK")),
        "16 bit": encode_image(sixteen, "PNG"),
        "animated": encode_image(frames[0], "GIF", save_all=True, append_images=frames[1:]),
    }


def bad_samples() -> dict[str, dict[str, bytes]]:
    photo = photograph()
    return {
        "no record": {"img0": photo},
        "image missing": {"json": record()},
        "more images than slots": {"json": record(images=1), "img0": photo, "img1": photo},
        "bad JSON": {"json": record()[:-20], "img0": photo},
        "bad record": {"json": b'{"conversations": [' + b"9" * 5000 + b"]}", "img0": photo},
        "unsafe image path": {"json": record(path="https://example.com/a.jpg"), "img0": photo},
        "too long": {"json": record("red square " * 200), "img0": photo},
        "control token": {"json": record("</s>", images=0)},
    }


def all_bad(skip: tuple[str, ...] = ("control token",)) -> dict[str, dict[str, bytes]]:
    images = {cause: {"json": record(), "img0": data} for cause, data in bad_images().items()}
    return {cause: files for cause, files in (bad_samples() | images).items() if cause not in skip}


def prefetch(
    data: Path, tokenizer: Tokenizer, state: object = None, quarantine: Quarantine | None = None, **options: object
) -> Prefetcher:
    """Read in the order of the shards' slices, one sample in each pack, unless ``options`` say otherwise."""
    keys = {"packing": "none", "shuffle_buffer_size": 1} | options
    reader = open_reader([data], tokenizer, **keys)
    return Prefetcher(
        reader,
        PilDecoder(),
        SquashPlan(SIZE, TOKENS_PER_IMAGE),
        tokenizer.imgpad_id,
        depth=3,
        state=state,
        quarantine=quarantine,
    )


def one_pass(data: Path, tokenizer: Tokenizer) -> Iterator[Pack]:
    return open_reader([data], tokenizer, training=False, packing="none")


def segment(read: ReadPack) -> tuple[bytes, ...]:
    """What the one sample of a pack is trained on."""
    pack = read.pack
    return tuple(array.tobytes() for array in (pack.tokens, pack.labels, pack.cu_seqlens, read.pixels.numpy()))


def taken(prefetcher: Prefetcher, count: int) -> list[ReadPack]:
    try:
        return [prefetcher.take() for _ in range(count)]
    finally:
        prefetcher.close()


@pytest.mark.parametrize("cause", list(all_bad()))
def test_it_costs_that_sample_and_no_neighbour(cause: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Tokens, labels and pixels of the others are those of the set without it, bit for bit."""
    goods = [good(i) for i in range(GOOD)]
    clean = taken(prefetch(write_raw(tmp_path / "clean", goods), tokenizer), 2 * GOOD)
    wanted = {segment(read) for read in clean}
    assert len(wanted) == GOOD
    data = write_raw(tmp_path / "data", [*goods[:5], all_bad()[cause], *goods[5:]])
    prefetcher = prefetch(data, tokenizer, quarantine=Quarantine(tmp_path / "run", 0))
    reads = taken(prefetcher, 3 * GOOD)
    trained = Counter(segment(read) for read in reads if not read.masked)
    assert set(trained) == wanted
    assert set(prefetcher.counters.skipped) == {cause} and prefetcher.counters.skipped[cause] in (2, 3, 4)
    masked = [read for read in reads if read.masked]
    for read in masked:
        assert (read.pack.labels == IGNORE_INDEX).all() and (read.pixels == GRAY).all()
    assert prefetcher.counters.samples == sum(trained.values()) + prefetcher.counters.skipped[cause]
    (line,) = read_list(tmp_path / "run" / "quarantine-0.jsonl")
    assert line == SkippedSample("data", "shard-000000.tar", "s-00005", cause)


def test_in_one_pack_with_others_a_bad_image_shifts_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Carried-over packs of several samples: each segment is one of the good ones, or has no labels."""
    goods = [good(i) for i in range(GOOD)]
    alone = {r.pack.sample_keys[0]: r for r in taken(prefetch(write_raw(tmp_path / "clean", goods), tokenizer), GOOD)}
    bad = [all_bad()["bad image (truncated)"], {"json": record(images=2), "img0": photograph(), "img1": b"x" * 99}]
    data = write_raw(tmp_path / "data", goods + bad * 2)
    reads = taken(prefetch(data, tokenizer, packing="carry_over", sequence_length=400), 12)
    seen: set[str] = set()
    for read in reads:
        pack = read.pack
        assert (pack.tokens == tokenizer.imgpad_id).sum() == TOKENS_PER_IMAGE * read.pixels.shape[0]
        bounds = zip(pack.cu_seqlens, pack.cu_seqlens[1:], strict=False)
        # Every sample has one image.
        for image, (key, (start, end)) in enumerate(zip(pack.sample_keys, bounds, strict=False)):
            index = int(key[-5:])
            if index < GOOD:
                own = alone[f"clean/s-{index:05d}"]
                length = end - start
                assert np.array_equal(pack.tokens[start:end], own.pack.tokens[:length])
                assert np.array_equal(pack.labels[start:end], own.pack.labels[:length])
                assert read.pixels[image].equal(own.pixels[0])
            else:
                assert (pack.labels[start:end] == IGNORE_INDEX).all()
            seen.add(key)
    assert len(seen) == GOOD + 2, "headers that are no images cost the sample before it is packed"


@pytest.mark.parametrize("name", ["pil", "auto"])
def test_odd_images_are_decoded(name: str) -> None:
    decoder = make_decoder(name)
    decoded = decoder.decode([*odd_images().values(), *bad_images().values()], SIZE)
    assert decoded.failed == [3, 4, 5, 6, 7]
    assert [f"bad image ({cause})" for cause in decoded.causes] == list(bad_images())
    assert all(len(np.unique(decoded.pixels[i].cpu().numpy())) > 20 for i in range(3))


def shard_of(data: Path) -> Path:
    return data / "shard-000000.tar"


def offsets(data: Path) -> list[int]:
    """Where each sample starts, and the end."""
    index = shard_of(data).with_suffix(".tar.idx").read_bytes()
    return list(struct.unpack(f"<{len(index) // 8}Q", index))


def cut(data: Path) -> None:
    """The tar file ends in the middle of sample 7."""
    at = offsets(data)
    with shard_of(data).open("r+b") as file:
        file.truncate((at[7] + at[8]) // 2)


def cut_at_a_border(data: Path) -> None:
    with shard_of(data).open("r+b") as file:
        file.truncate(offsets(data)[7])


def emptied(data: Path) -> None:
    shard_of(data).write_bytes(b"")


def overwrite(data: Path, at: int, content: bytes) -> None:
    with shard_of(data).open("r+b") as file:
        file.seek(at)
        file.write(content)


def garbage(data: Path) -> None:
    overwrite(data, offsets(data)[7], b"\xa5" * 600)


def broken_second_header(data: Path) -> None:
    """Of sample 7, the header of the image: a reader that stops there would see a sample without its image."""
    with tarfile.open(shard_of(data)) as tar:
        overwrite(data, tar.getmember("s-00007.img0").offset, b"\0" * 512)


def two_samples_as_one(data: Path) -> None:
    """The image of sample 7 says that it is another's."""
    with tarfile.open(shard_of(data)) as tar:
        member = tar.getmember("s-00007.img0")
    header = tarfile.TarInfo("s-00003.img0")
    header.size = member.size
    overwrite(data, member.offset, header.tobuf(tarfile.USTAR_FORMAT))


def a_link(data: Path) -> None:
    """The image of sample 7 is a link out of the archive; it is not followed."""
    with tarfile.open(shard_of(data)) as tar:
        member = tar.getmember("s-00007.img0")
    header = tarfile.TarInfo("s-00007.img0")
    header.type, header.linkname = tarfile.SYMTYPE, "/etc/hostname"
    size = member.offset_data + (member.size + 511) // 512 * 512 - member.offset
    filler = tarfile.TarInfo("filler")
    filler.size = size - 1024
    overwrite(data, member.offset, header.tobuf(tarfile.USTAR_FORMAT) + filler.tobuf(tarfile.USTAR_FORMAT))


def header_of_7(data: Path, start: int, content: bytes) -> None:
    """Overwrite a part of the header of sample 7's image, and mend its sum."""
    with tarfile.open(shard_of(data)) as tar:
        at = tar.getmember("s-00007.img0").offset
    header = bytearray(shard_of(data).read_bytes()[at : at + 512])
    header[start : start + len(content)] = content
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    overwrite(data, at, bytes(header))


def endless_size(data: Path) -> None:
    """A few flipped bits in the size make a number of GNU's own form that no integer of C holds."""
    header_of_7(data, 124, b"\x80\0\0\x7f" + b"\xff" * 8)


def negative_size(data: Path) -> None:
    header_of_7(data, 124, b"\xff" * 12)


def size_that_is_no_number(data: Path) -> None:
    header_of_7(data, 124, b"9z\xe9\xff~~~~~~~\0")


def endless_hole(data: Path) -> None:
    """A sparse file of GNU's: four bytes that stand for a terabyte of zeros."""
    fields = b"%011o\0" % 0 + b"%011o\0" % 4
    header_of_7(data, 156, b"S")
    header_of_7(data, 386, fields + bytes(72))
    header_of_7(data, 483, b"\x80" + (1 << 40).to_bytes(11, "big"))


def old_extended_header(data: Path) -> None:
    """The image says that it is a list of attributes of the file behind it."""
    header_of_7(data, 156, b"x")


def removed_bytes(data: Path) -> None:
    """One block is gone, so that all samples behind it lie elsewhere than the index says."""
    content, at = shard_of(data).read_bytes(), offsets(data)[7] + 512
    shard_of(data).write_bytes(content[:at] + content[at + 512 :])


def cut_index(data: Path) -> None:
    path = shard_of(data).with_suffix(".tar.idx")
    path.write_bytes(path.read_bytes()[: 8 * 8])


DAMAGE = {
    cut: (CUT, range(7, GOOD)),
    cut_at_a_border: (CUT, range(7, GOOD)),
    emptied: (CUT, range(GOOD)),
    garbage: (BROKEN, [7]),
    broken_second_header: (BROKEN, [7]),
    two_samples_as_one: (BROKEN, [7]),
    a_link: ("image missing", [7]),
    endless_size: (BROKEN, [7]),
    negative_size: (BROKEN, [7]),
    size_that_is_no_number: (BROKEN, [7]),
    endless_hole: (BROKEN, [7]),
    old_extended_header: (BROKEN, [7]),
    removed_bytes: (BROKEN, range(7, GOOD)),
    cut_index: (NO_INDEX, range(7, GOOD)),
}


@pytest.mark.parametrize(("damage", "num_workers"), [*((damage, 0) for damage in DAMAGE), (cut, 1)])
def test_a_damaged_shard_costs_what_lies_there(
    damage: object, num_workers: int, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    samples = [good(i) for i in range(GOOD)]
    second = [good(i) for i in range(40)]
    clean = write_raw(tmp_path / "clean" / "data", samples + second[: 40 - GOOD] + second)
    data = tmp_path / "data"
    shutil.copytree(clean, data)
    with sqlite3.connect(data / ".nv-meta" / "index.sqlite") as connection:
        assert connection.execute("SELECT count(*) FROM samples").fetchone() == (80,)
    wanted = {p.sample_keys[0]: p.tokens.tobytes() + p.labels.tobytes() for p in one_pass(clean, tokenizer)}
    damage(data)
    cause, lost = DAMAGE[damage]
    lost = set(range(lost[0], 40)) if len(lost) > 1 else set(lost)
    reader = open_reader([data], tokenizer, training=True, packing="none", num_workers=num_workers)
    packs = list(islice(reader, 300))
    reader.close()
    found = {p.sample_keys[0]: p.tokens.tobytes() + p.labels.tobytes() for p in packs}
    assert found == {key: value for key, value in wanted.items() if int(key[-5:]) not in lost}
    skipped = {sample for pack in packs for sample in pack.skipped}
    assert {sample.key for sample in skipped} == {f"s-{i:05d}" for i in lost}
    assert {sample.shard for sample in skipped} == {"shard-000000.tar"}
    assert {sample.cause for sample in skipped} == {cause}


def test_a_missing_or_foreign_shard_is_refused_at_the_start(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = write_raw(tmp_path / "data", [good(i) for i in range(GOOD)])
    shard_of(data).with_suffix(".tar.idx").rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"shard-000000.tar.idx is missing, which .nv-meta names"):
        open_reader([data], tokenizer)
    for file in (data / ".nv-meta" / ".info.json", data / ".nv-meta" / "split.yaml"):
        file.write_text(file.read_text().replace("shard-000000.tar", "../shard-000000.tar"))
    with pytest.raises(ValueError, match=r"names the shard '../shard-000000.tar' outside of it"):
        open_reader([data], tokenizer)


def test_remote_images_are_refused_with_the_remedy() -> None:
    for path in ("https://example.com/a.jpg", "s3://b/a.jpg"):
        with pytest.raises(UnsafePathError, match=r"is a URL, and none is fetched; download it into"):
            parse_conversation(json.loads(record(path=path)))
    for path in ("/etc/passwd", "../a.jpg", "a/../../b.jpg"):
        with pytest.raises(UnsafePathError, match=r"absolute|leaves the image directory"):
            parse_conversation(json.loads(record(path=path)))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_restart_skips_counts_and_lists_the_same(num_workers: int, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Killed 5 packs behind the state that it goes on from, so that some samples are seen again."""
    samples = [files for i in range(5) for files in (good(i), good(i + 5), *all_bad().values())]
    data = write_raw(tmp_path / "data", samples)
    cut(data)
    options = {"num_workers": num_workers, "packing": "carry_over", "shuffle_buffer_size": 8, "packing_buffer_size": 4}
    whole = prefetch(data, tokenizer, quarantine=Quarantine(tmp_path / "whole", 0), **options)
    wanted = [segment(read) for read in taken(whole, 30)]

    first = prefetch(data, tokenizer, quarantine=Quarantine(tmp_path / "run", 0), **options)
    found = [segment(first.take()) for _ in range(8)]
    state = json.loads(json.dumps(first.state()))
    assert [segment(read) for read in taken(first, 5)] == wanted[8:13]
    path = tmp_path / "run" / "quarantine-0.jsonl"
    path.write_bytes(path.read_bytes() + b'{"dataset": "da')
    second = prefetch(data, tokenizer, state, Quarantine(tmp_path / "run", 0), **options)
    found += [segment(read) for read in taken(second, 22)]
    assert found == wanted
    assert second.counters.skipped == whole.counters.skipped and second.counters.samples == whole.counters.samples
    assert len(whole.counters.skipped) >= 10 and CUT in whole.counters.skipped
    assert path.read_text() == (tmp_path / "whole" / "quarantine-0.jsonl").read_text()
    lines = path.read_text().splitlines()
    assert len(lines) == len(set(lines)) >= 20


def test_a_list_holds_each_sample_once(tmp_path: Path) -> None:
    one, two = (SkippedSample("d", "s.tar", key, "too long") for key in "ab")
    other = Quarantine(tmp_path, 1)
    other.add([two])
    other.close()
    quarantine = Quarantine(tmp_path, 0)
    quarantine.add([one, one, two])
    quarantine.add([one])
    quarantine.close()
    assert list(read_list(quarantine.path)) == [one]
    full = Quarantine(tmp_path / "x", 0)
    full.path.mkdir()
    full.add([one])  # costs a warning only
