"""Mutated pictures through every reader and decoder: no two may see another size, and none may take what it likes.

    python benchmarks/fuzz_images.py --count 3000 --seconds 600 --decoders pil,simplejpeg,dali --save failures

Sound pictures of all formats that are read (and some that are not) are damaged, cut, spliced and given second headers,
the same for a seed on every machine. For each of them it is checked that

- reading it ends in pixels or in an ``ImageError``, in seconds, and the process lives,
- what was decoded has the size that the header was read as, so that the limits hold,
- the memory that it took stays below a bound (limits are lowered to pictures of 500 x 500 pixels meanwhile),
- no decoder turns or mirrors what another leaves as it is.

Damaged pixels may differ between decoders, and one may give up where another goes on: that is counted, and no failure.
Each decoder works in a process of its own, which a crash ends and which is started again behind the case.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megavlm.data import image_header, images
from megavlm.data.decode import ImageDecoder
from megavlm.data.decoders import make_decoder

LIMIT = 250_000
"""Pixels of the largest picture while this runs."""
MOST_MEMORY = 64 << 20
"""Bytes that one picture of this size may take beyond what was taken before."""
ADDRESS_SPACE = 2 << 30
"""Bytes that may be asked for beyond what is mapped at the start: more is an error, touched or not."""
MOST_SECONDS = 20
_SIZE = 32
_UNREAD = ("eps", "ico", "psd")


@dataclass
class Outcome:
    """What became of one case with one decoder."""

    index: int
    format: str
    header: tuple[int, int] | None = None
    """Size by the header; None where it was refused."""
    decoded: tuple[int, int] | None = None
    """Size of what the decoder made, before it was turned."""
    cause: str = ""
    """Why there are no pixels."""
    pixels: list[int] = field(default_factory=list)
    """Thumbnail, [3 * 32 * 32], where there are."""
    faults: list[str] = field(default_factory=list)


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@functools.cache
def seeds() -> dict[str, bytes]:
    """Return sound pictures, by format and kind: no side equals the other, and no turn of one looks like it."""
    y, x = np.mgrid[0:48, 0:64]
    image = Image.fromarray(np.stack([x * 4, y * 5, (x * 3 + y * 7) % 256], -1).astype(np.uint8))
    image.paste((255, 255, 0), (0, 0, 20, 10))
    gray16 = Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 200)
    floats = Image.fromarray(np.asarray(image.convert("L"), np.float32) / 255)
    frames = [image.rotate(10 * i) for i in range(3)]
    alpha = image.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(image.size))
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="8"/></rdf:RDF></x:xmpmeta>'
    more = {"save_all": True, "append_images": frames}
    return {
        "jpeg": _encode(image, "JPEG", quality=90),
        "jpeg progressive": _encode(image, "JPEG", progressive=True),
        "jpeg gray": _encode(image.convert("L"), "JPEG"),
        "jpeg cmyk": _encode(image.convert("CMYK"), "JPEG"),
        "jpeg exif": _encode(image, "JPEG", exif=exif),
        "jpeg xmp": _encode(image, "JPEG", xmp=xmp),
        "jpeg several": _encode(image, "MPO", **more),
        "png": _encode(image, "PNG"),
        "png gray": _encode(image.convert("L"), "PNG"),
        "png palette": _encode(image.quantize(16), "PNG", transparency=3),
        "png alpha": _encode(alpha, "PNG", exif=exif),
        "png 16": _encode(gray16, "PNG"),
        "png animated": _encode(image, "PNG", **more),
        "gif": _encode(image.quantize(16), "GIF"),
        "gif animated": _encode(image, "GIF", **more),
        "webp": _encode(image, "WEBP", quality=90),
        "webp lossless": _encode(alpha, "WEBP", lossless=True),
        "webp animated": _encode(image, "WEBP", **more),
        "bmp": _encode(image, "BMP"),
        "bmp 1": _encode(image.convert("1"), "BMP"),
        "tiff": _encode(image, "TIFF"),
        "tiff lzw": _encode(alpha, "TIFF", compression="tiff_lzw"),
        "tiff jpeg": _encode(image, "TIFF", compression="jpeg"),
        "tiff 16": _encode(gray16, "TIFF"),
        "tiff float": _encode(floats, "TIFF", compression="tiff_deflate"),
        "ppm": _encode(image, "PPM"),
        "ppm gray": _encode(image.convert("L"), "PPM"),
        "eps": _encode(image, "EPS"),
        "ico": _encode(image, "ICO"),
        "psd": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 48, 64, 8, 3) + bytes(12) + bytes(9218),
    }


def png_chunk(name: bytes, body: bytes) -> bytes:
    """Return a chunk of PNG with its sum."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def jpeg_segment(marker: int, body: bytes) -> bytes:
    """Return a segment of JPEG with its length."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def frame_header(width: int, height: int, marker: int = 0xC0) -> bytes:
    """Return a JPEG's frame header of one component."""
    return jpeg_segment(marker, struct.pack(">BHHB", 8, height, width, 1) + b"\x01\x11\x00")


def resized_jpeg(data: bytes, width: int, height: int) -> bytes:
    """Return a JPEG whose frame header says another size."""
    at = next(at for at in (data.find(bytes([0xFF, marker])) for marker in (0xC0, 0xC2)) if at >= 0)
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def tiff(tags: dict[int, int]) -> bytes:
    """Return a little TIFF of 8-bit gray, packed by LZW, with more tags."""
    tags = {258: 8, 259: 5, 262: 1, 277: 1} | tags
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IQH", 16, 0, len(tags)) + entries + bytes(4)


def known() -> dict[str, bytes]:
    """Files that were made to deceive: one reader believes 16 x 16 pixels, another 60000 x 60000."""
    found = {}
    jpeg, small, huge = seeds()["jpeg"], frame_header(16, 16), resized_jpeg(seeds()["jpeg"], 60000, 60000)
    # A marker without a length: who takes the next two bytes for one jumps to the header in a comment.
    start, comment = b"\xff\xd8\xff\xd0", 60000
    first = start + jpeg_segment(0xFE, b"A" * (comment - 4))
    inner = 4 + 0xFFFE - len(first) - 4
    found["jpeg jumps to a comment"] = first + jpeg_segment(0xFE, b"A" * inner + small + b"A" * 8) + huge[2:]
    found["jpeg two frames"] = huge[:2] + small + huge[2:]
    found["jpeg frames in turn"] = jpeg[:2] + huge[huge.find(b"\xff\xc0") :][:19] + jpeg[2:]
    found["jpeg tables first"] = jpeg[:2] + jpeg_segment(0xFE, small) + b"\xff\xd9" + huge
    found["jpeg thumbnail"] = jpeg[:2] + jpeg_segment(0xE1, b"Exif\0\0" + jpeg) + huge[2:]
    found["jpeg junk before markers"] = jpeg[:2] + b"\0\0\0" + huge[2:]
    found["jpeg padding"] = jpeg[:2] + b"\xff" * 99 + huge[2:]
    found["jpeg many scans"] = seeds()["jpeg progressive"][:-2] + b"\xff\xda\x00\x08\x01\x01\x00\x01\x01\x00" * 500
    png = seeds()["png"]
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    found["png two headers"] = png[:33] + png_chunk(b"IHDR", header) + png[33:]
    found["png large"] = png[:8] + png_chunk(b"IHDR", header) + png[33:]
    webp = seeds()["webp"]
    canvas = b"\0\0\0\0" + (16382).to_bytes(3, "little") * 2
    body = b"WEBPVP8X" + struct.pack("<I", 10) + canvas + webp[12:]
    found["webp canvas"] = b"RIFF" + struct.pack("<I", len(body)) + body
    found["tiff large"] = tiff({256: 60000, 257: 60000, 273: 8, 278: 60000, 279: 8})
    found["tiff tiles"] = tiff({256: 64, 257: 48, 322: 60000, 323: 60000, 324: 8, 325: 8})
    gif = seeds()["gif"]
    found["gif frame beyond its screen"] = gif.replace(
        b"\x2c\0\0\0\0" + struct.pack("<HH", 64, 48), b"\x2c\0\0\0\0" + struct.pack("<HH", 65535, 65535)
    )
    found["gif screen"] = gif[:6] + struct.pack("<HH", 65535, 65535) + gif[10:]
    found["ppm large"] = b"P6\n60000 60000\n255\n" + bytes(99)
    found["ppm narrow"] = b"P6\n240000 1\n255\n" + bytes(720_000)
    return found


Mutator = Callable[[random.Random, bytearray], bytes]


def _flip(rng: random.Random, data: bytearray) -> bytes:
    for _ in range(rng.choice((1, 1, 2, 8, 40))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _number(rng: random.Random, data: bytearray) -> bytes:
    """Write a number that matters where headers are."""
    value = rng.choice((0, 1, 2, 16, 255, 256, 499, 501, 4096, 16383, 60000, 65535, 0x7FFFFFFF, 0xFFFFFFFF))
    form = rng.choice((">H", "<H", ">I", "<I"))
    width = struct.calcsize(form)
    at = rng.randrange(max(1, min(len(data) - width, rng.choice((64, 200, len(data))))))
    data[at : at + width] = struct.pack(form, value & (256**width - 1))
    return bytes(data)


def _cut(rng: random.Random, data: bytearray) -> bytes:
    return bytes(data[: rng.randrange(len(data))])


def _remove(rng: random.Random, data: bytearray) -> bytes:
    at = rng.randrange(len(data))
    return bytes(data[:at] + data[at + rng.choice((1, 2, 4, 16, 200)) :])


def _repeat(rng: random.Random, data: bytearray) -> bytes:
    start, at = rng.randrange(len(data)), rng.randrange(len(data))
    return bytes(data[:at] + data[start : start + rng.choice((4, 12, 25, 60, 600))] + data[at:])


def _splice(rng: random.Random, data: bytearray) -> bytes:
    other = seeds()[rng.choice(list(seeds()))]
    return bytes(data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :])


def _second_header(rng: random.Random, data: bytearray) -> bytes:
    """Put a header of another size, or what turns a picture, where segments or chunks begin."""
    width, height = rng.choice(((16, 16), (64, 48), (499, 500), (3000, 3000), (60000, 60000)))
    orientation = rng.randrange(10)
    exif = Image.Exif()
    exif[0x0112] = orientation
    xmp = f'<x tiff:Orientation="{orientation}"/>'.encode()
    if data[:2] == b"\xff\xd8":
        extra = rng.choice((
            frame_header(width, height, rng.choice((0xC0, 0xC1, 0xC2, 0xC3, 0xC9))),
            jpeg_segment(0xE1, exif.tobytes()), jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp),
            jpeg_segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([rng.randrange(3)])),
            b"\xff" + bytes([rng.randrange(256)]), b"\xff\xd8", b"\xff\xd9", b"\xff" * 7, b"\0" * 3, b"\xff\x00",
        ))  # fmt: skip
        places = [at for at in range(len(data) - 1) if data[at] == 0xFF and data[at + 1] >= 0xC0]
    elif data[:4] == b"\x89PNG":
        extra = rng.choice((
            png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, rng.choice((0, 2, 3, 4, 6)), 0, 0, 0)),
            png_chunk(b"eXIf", exif.tobytes()[6:]), png_chunk(b"tRNS", rng.randbytes(6)),
            png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
            png_chunk(b"acTL", struct.pack(">II", 2, 0)), png_chunk(b"IEND", b""),
        ))  # fmt: skip
        places = [max(0, data.find(name) - 4) for name in (b"IDAT", b"IEND", b"PLTE", b"IHDR") if name in data] or [0]
    else:
        return _number(rng, data)
    at = rng.choice(places or [0])
    return bytes(data[:at] + extra + data[at:])


MUTATORS: tuple[Mutator, ...] = (
    _flip, _number, _number, _cut, _remove, _repeat, _splice, _second_header, _second_header, _second_header,
)  # fmt: skip


def case(seed: int, index: int) -> tuple[str, bytes]:
    """Return the format and the file of a case: those made to deceive come first, then sound ones, then mutants."""
    first = list(known().items()) + list(seeds().items())
    if index < len(first):
        return first[index][0].split()[0], first[index][1]
    rng = random.Random(f"{seed}-{index}")
    name = rng.choice(list(seeds()))
    data = seeds()[name]
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = rng.choice(MUTATORS)(rng, bytearray(data)) or b"\0"
    return name.split()[0], data


def try_case(decoder: ImageDecoder, seed: int, index: int) -> Outcome:
    """Read and decode one case; what must not happen is in ``faults``."""
    kind, data = case(seed, index)
    outcome = Outcome(index, kind)
    before, start = _most_memory(), time.perf_counter()
    try:
        header = images.read_header(data)
        outcome.header = (header.width, header.height)
        outcome.decoded = images.decode_with_pil(data).size
        if header.kind == "jpeg" and header.plain:
            _compare_libjpeg(data, outcome)
    except images.ImageError as error:
        outcome.cause = error.cause
    except ValueError as error:
        outcome.cause = f"libjpeg: {type(error).__name__}"
    except Exception as error:
        outcome.faults.append(f"{type(error).__name__} got out: {error}")
    if outcome.decoded and outcome.header and sorted(outcome.decoded) != sorted(outcome.header):
        outcome.faults.append(f"header {outcome.header}, decoded {outcome.decoded}")
    try:
        result = decoder.decode([data], _SIZE)
        outcome.cause = result.causes[0] if result.failed else ""
        outcome.pixels = [] if result.failed else result.pixels[0].flatten().tolist()
    except Exception as error:
        outcome.faults.append(f"{type(error).__name__} got out of the decoder: {error}")
    if outcome.cause == images.OUT_OF_MEMORY:
        outcome.faults.append("asked for more memory than a picture within the limits can need")
    if outcome.pixels and kind in _UNREAD and data == seeds().get(kind):
        outcome.faults.append("a format that must not be read was read")
    if _most_memory() - before > MOST_MEMORY:
        outcome.faults.append(f"took {(_most_memory() - before) >> 20} MiB")
    if time.perf_counter() - start > MOST_SECONDS:
        outcome.faults.append(f"took {time.perf_counter() - start:.0f} s")
    return outcome


def _compare_libjpeg(data: bytes, outcome: Outcome) -> None:
    height, width = images.decode_jpeg(data).shape[:2]
    if (width, height) != outcome.header:
        outcome.faults.append(f"header {outcome.header}, libjpeg {(width, height)}")


def _most_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class LowLimit:
    """The limits of the library, lowered while the block runs, so that going over them is cheap."""

    def __enter__(self) -> None:
        self._before = image_header.MAX_PIXELS, images.MAX_PIXELS
        image_header.MAX_PIXELS = images.MAX_PIXELS = LIMIT

    def __exit__(self, *_: object) -> None:
        image_header.MAX_PIXELS, images.MAX_PIXELS = self._before


_TURNS: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
    lambda a: a[:, :, ::-1], lambda a: a[:, ::-1], lambda a: a[:, ::-1, ::-1],
    lambda a: a.transpose(0, 2, 1), lambda a: a.transpose(0, 2, 1)[:, :, ::-1],
    lambda a: a.transpose(0, 2, 1)[:, ::-1], lambda a: a.transpose(0, 2, 1)[:, ::-1, ::-1],
)  # fmt: skip


def compare(one: Outcome, other: Outcome) -> str:
    """Return how two decoders' pixels of a case relate: equal, different, turned, or only one has any."""
    if bool(one.pixels) != bool(other.pixels):
        return "one gives up"
    if not one.pixels:
        return "both give up"
    a, b = (np.array(o.pixels, np.int16).reshape(3, _SIZE, _SIZE) for o in (one, other))
    apart = np.abs(a - b).mean()
    if apart < 3:
        return "equal"
    return "turned" if any(np.abs(a - turn(b)).mean() < min(3.0, apart / 2) for turn in _TURNS) else "different"


def summarise(outcomes: dict[str, dict[int, Outcome]]) -> tuple[dict[str, Counter[str]], list[str]]:
    """Compare the decoders with the first of them.

    Returns:
        Counts by format, and a line for each failure.
    """
    reference, *others = outcomes
    counts: dict[str, Counter[str]] = {}
    failures = []
    for index, one in sorted(outcomes[reference].items()):
        row = counts.setdefault(one.format, Counter())
        row["cases"] += 1
        row["header refused" if one.header is None else "decoded" if one.pixels else "decoding failed"] += 1
        for name, found in outcomes.items():
            if index in found:
                failures += [f"case {index} ({one.format}) with {name}: {fault}" for fault in found[index].faults]
        for name in others:
            if index not in outcomes[name]:
                continue
            relation = compare(one, outcomes[name][index])
            row[f"{relation} in {name}"] += 1
            if relation == "turned":
                failures.append(f"case {index} ({one.format}): {name} turns it, {reference} does not")
    return counts, failures


def _child(args: argparse.Namespace) -> None:
    """Try cases with one decoder; write a line before and after each."""
    decoder = make_decoder(args.child)
    decoder.decode([seeds()["jpeg"], seeds()["png"]], _SIZE)  # what libraries take once is no picture's
    if args.child != "dali":  # its threads have address spaces of their own
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESS_SPACE,) * 2)
    deadline = time.monotonic() + args.seconds
    with LowLimit():
        for index in range(args.first, args.count):
            if time.monotonic() > deadline:
                break
            print(index, flush=True)
            signal.alarm(3 * MOST_SECONDS)
            print(json.dumps(asdict(try_case(decoder, args.seed, index))), flush=True)


def run_child(args: argparse.Namespace, name: str) -> Iterator[Outcome]:
    """Yield what became of each case with one decoder, in a process that may die."""
    first, deadline = 0, time.monotonic() + args.seconds
    while first < args.count and time.monotonic() < deadline:
        command = [sys.executable, __file__, "--child", name, "--first", str(first), "--count", str(args.count)]
        command += ["--seed", str(args.seed), "--seconds", str(max(1.0, deadline - time.monotonic()))]
        with (
            tempfile.TemporaryFile() as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
        ):
            assert process.stdout is not None
            started, done = None, first - 1
            for line in process.stdout:
                found = json.loads(line)
                if isinstance(found, int):
                    started = found
                    continue
                done = found["index"]
                yield _outcome(found)
            code = process.wait()
            if code == 0:
                return
            errors.seek(0)
            told = errors.read().decode(errors="replace").splitlines()[-1:]
        if started is None or started == done:
            raise RuntimeError(f"the process of {name} ended with {code} between cases: {told}")
        dead = Outcome(started, case(args.seed, started)[0])
        dead.faults.append(f"the process ended with {code}: {told}")
        yield dead
        first = started + 1


def _outcome(found: dict[str, Any]) -> Outcome:
    for key in ("header", "decoded"):
        found[key] = tuple(found[key]) if found[key] else None
    return Outcome(**found)


def save(failures: Iterable[str], seed: int, directory: Path) -> None:
    """Write the files of failing cases."""
    directory.mkdir(parents=True, exist_ok=True)
    for index in {int(line.split()[1]) for line in failures}:
        kind, data = case(seed, index)
        (directory / f"{seed}-{index}.{kind}").write_bytes(data)


def main(argv: list[str] | None = None) -> int:
    """Run; 1 where anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=3000, help="cases (default 3000)")
    parser.add_argument("--seconds", type=float, default=600, help="for each decoder, at most (default 600)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--decoders", default="pil,simplejpeg,dali", help="the first is the yardstick")
    parser.add_argument("--save", type=Path, metavar="DIR", help="where files that failed are written")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        _child(args)
        return 0
    outcomes = {}
    for name in args.decoders.split(","):
        start = time.monotonic()
        outcomes[name] = {outcome.index: outcome for outcome in run_child(args, name)}
        print(f"{name}: {len(outcomes[name])} cases in {time.monotonic() - start:.0f} s", flush=True)
    counts, failures = summarise(outcomes)
    total: Counter[str] = Counter()
    for kind, row in sorted(counts.items()):
        total += row
        print(f"{kind:6}", ", ".join(f"{number} {what}" for what, number in sorted(row.items())))
    print("all   ", ", ".join(f"{number} {what}" for what, number in sorted(total.items())))
    print("\n".join(failures) or "no failures")
    if failures and args.save is not None:
        save(failures, args.seed, args.save)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
