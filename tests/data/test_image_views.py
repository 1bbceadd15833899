"""Views of photographs are those of Transformers' PIL processors, by every decoder; and what no decoder can make."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import encode_image, open_reader, smooth_image, write_raw
from PIL import Image

from megavlm.config.errors import UserError
from megavlm.data.batch import IGNORE_INDEX
from megavlm.data.decode import GRAY, ImageDecoder
from megavlm.data.decoders import make_decoder
from megavlm.data.feed import Prefetcher
from megavlm.data.images import ImageError, image_runs, lay_out, upright_size
from megavlm.data.media import ImagePlan, ImageShape
from megavlm.data.plans_single import CropPlan, PadPlan, SquashPlan
from megavlm.data.plans_slices import SlicesPlan
from megavlm.data.plans_tiles import AnyresMaxPlan, AnyresPlan, DynamicTilesPlan
from megavlm.data.read_pack import decode_pack
from megavlm.data.render import render, resized
from megavlm.data.tokenizer import Tokenizer

PHOTOGRAPHS = ("chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "astronaut.png")
SIDE = 224
PINPOINTS = tuple((rows * SIDE, columns * SIDE) for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)))
MEAN = (122, 116, 104)  # CLIP's, in levels, rounded down
RAW = {"do_normalize": False, "do_rescale": False}
SQUARE = {"height": SIDE, "width": SIDE}

PLANS: dict[str, ImagePlan] = {
    "squash": SquashPlan(SIDE, 9),
    "squash bilinear": SquashPlan(SIDE, 9, "bilinear"),
    "squash lanczos": SquashPlan(SIDE, 9, "lanczos"),
    "pad": PadPlan(SIDE, 9, fill=MEAN),
    "crop": CropPlan(SIDE, 9, short_side=SIDE),
    "anyres": AnyresPlan(SIDE, 9, pinpoints=PINPOINTS),
    "anyres_max": AnyresMaxPlan(SIDE, 9, pinpoints=PINPOINTS),
    "dynamic_tiles": DynamicTilesPlan(SIDE, 9),
}


def theirs(name: str) -> Any:
    """Transformers' processor of the family that a plan is of."""
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    points = [list(one) for one in PINPOINTS]
    short = {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}
    made = {
        "squash": lambda: SiglipImageProcessorPil(size=SQUARE, resample=3, **RAW),
        "squash bilinear": lambda: SiglipImageProcessorPil(size=SQUARE, resample=2, **RAW),
        "squash lanczos": lambda: SiglipImageProcessorPil(size=SQUARE, resample=1, **RAW),
        "pad": lambda: LlavaImageProcessorPil(**short, do_pad=True, **RAW),
        "crop": lambda: CLIPImageProcessorPil(**short, **RAW),
        "anyres": lambda: LlavaNextImageProcessorPil(**short, image_grid_pinpoints=points, **RAW),
        "anyres_max": lambda: LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=points, **RAW),
        "dynamic_tiles": lambda: GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, **RAW),
    }
    return made[name]()


@functools.cache
def photographs() -> dict[str, bytes]:
    """Photographs that ship inside scikit-image, as JPEG and as PNG."""
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        pytest.skip("scikit-image is not installed")
    folder, files = Path(found.origin).parent / "data", {}
    for name in PHOTOGRAPHS:
        image = Image.open(folder / name).convert("RGB")
        if name == "chelsea.png":
            files[f"{name} as PNG"] = encode_image(image, "PNG")
        # Without chroma subsampling all libjpegs agree on the pixels.
        files[f"{name} as JPEG"] = encode_image(image, "JPEG", quality=95, subsampling=0)
    return files


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("kind", ["pil", "simplejpeg", "dali"])
def test_pixels_of_photographs_are_transformers(name: str, kind: str) -> None:
    """Within one level of 255 for at least 99.9 % of the pixels; with PIL all of them are equal."""
    pytest.importorskip({"pil": "PIL", "dali": "nvidia.dali"}.get(kind, kind))
    plan, processor, decoder = PLANS[name], theirs(name), make_decoder(kind)
    files = list(photographs().values())
    decoded = decoder.decode(files, plan, [lay_out([data], plan)[0] for data in files])
    expected = []
    for data in files:
        pixels = processor(Image.open(io.BytesIO(data)).convert("RGB"))["pixel_values"]
        expected += [view for one in pixels for view in (one if np.asarray(one).ndim == 4 else [one])]
    assert not decoded.failed
    difference = (decoded.pixels.int() - torch.from_numpy(np.stack(expected)).int()).abs()
    assert (difference <= (0 if kind == "pil" else 1)).float().mean() >= (1 if kind == "pil" else 0.999)


def test_a_gpus_resize_is_as_near() -> None:
    """On a GPU torch resizes in fp32; the CPU's fp32 is the same formula."""
    for data in photographs().values():
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        for mode, kind in (("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR)):
            for size in ((84, 84), (336, 252), (900, 700)):
                ours = resized(torch.from_numpy(np.array(picture)).permute(2, 0, 1), size, mode, exact_type=True)
                expected = torch.from_numpy(np.array(picture.resize(size, kind))).permute(2, 0, 1)
                assert ((ours.int() - expected.int()).abs() <= 1).float().mean() >= 0.999


def test_slices_of_photographs() -> None:
    """Views that are not square: no oracle but PIL itself, on the boxes that ``test_image_plans`` compares."""
    plan = SlicesPlan(112, 16, multiple=14)
    for data in photographs().values():
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        layout = plan.plan(*picture.size)
        for view, pixels in zip(layout.views, render(data, plan), strict=True):
            whole = picture.resize(layout.canvases[view.canvas].resized, Image.Resampling.BICUBIC)
            assert np.array_equal(pixels, np.asarray(whole.crop(view.box)))


def turned(image: Image.Image, orientation: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode_image(image, kind, exif=exif)


def test_the_size_is_that_of_the_upright_picture() -> None:
    image = smooth_image(1, 600, 200)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    xmp += b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    upside = [encode_image(image), turned(image, 3), encode_image(image, "PNG"), encode_image(image, "WEBP")]
    lying = [turned(image, 6), turned(image, 8, "PNG"), turned(image, 5, "WEBP"), turned(image, 6, "TIFF")]
    lying.append(encode_image(image, xmp=xmp))
    assert [upright_size(data) for data in upside] == [(600, 200)] * 4
    assert [upright_size(data) for data in lying] == [(200, 600)] * 5
    plan = PLANS["anyres"]
    for data in upside + lying:
        (layout,) = lay_out([data], plan)
        decoded = make_decoder("simplejpeg").decode([data], plan, [layout])  # views of that size, or a failure
        assert not decoded.failed and layout.grid == ((1, 3) if data in upside else (3, 1))


def test_a_header_that_is_wrong_about_the_size_costs_its_picture_alone(decoder: ImageDecoder) -> None:
    """The number of tokens was told from the header: pixels of another size must not take their places."""
    plan, good = PLANS["anyres"], encode_image(smooth_image(1, 120, 40))
    layouts = [plan.plan(120, 40), plan.plan(40, 120), plan.plan(120, 40)]
    decoded = decoder.decode([good] * 3, plan, layouts)
    assert (decoded.failed, decoded.causes) == ([1], ["broken header"])
    assert decoded.pixels.shape[0] == 9 and (decoded.pixels[3:6] == GRAY).all()
    assert torch.equal(decoded.pixels[:3], decoded.pixels[6:])


@pytest.fixture(params=["pil", "simplejpeg", "dali"])
def decoder(request: pytest.FixtureRequest) -> ImageDecoder:
    pytest.importorskip({"pil": "PIL", "dali": "nvidia.dali"}.get(request.param, request.param))
    return make_decoder(request.param)


def record(images: int, text: str = "what") -> bytes:
    shown = "".join(f"Picture {i + 1}: <img>{i}.jpg</img>\n" for i in range(images))
    turns = [{"from": "user", "value": f"{shown}{text}"}, {"from": "assistant", "value": "a cat"}]
    return json.dumps({"id": "x", "conversations": turns}).encode()


SMALL = AnyresPlan(16, 4, pinpoints=((16, 32), (32, 16), (32, 32)))


def strange(bomb: tuple[int, int]) -> bytes:
    png = encode_image(smooth_image(4, 20, 20), "PNG")
    return png[:16] + struct.pack(">II", *bomb) + png[24:]


def test_bad_pictures_and_long_ones_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    good, wide = encode_image(smooth_image(1, 40, 20)), encode_image(smooth_image(2, 10000, 1), "PNG")
    samples = [{"json": record(1), "img0": good}, {"json": record(0)}] * 4
    samples += [
        {"json": record(1), "img0": wide},
        {"json": record(1), "img0": strange((0, 0))},
        {"json": record(1), "img0": strange((20000, 20000))},
        {"json": record(2), "img0": good},
        {"json": record(8), **{f"img{i}": good for i in range(8)}},
    ]
    data = write_raw(tmp_path / "d", samples)
    dropped = {}
    for name, plan in {"crop": CropPlan(16, 4, short_side=16), "squash": SquashPlan(16, 4), "anyres": SMALL}.items():
        reader = open_reader([data], tokenizer, plan=plan, training=False, sequence_length=160)
        packs = list(islice(reader, 50))
        dropped[name] = dict(reader.dropped)
        kept = sum(len(pack.sample_keys) for pack in packs)
        assert kept + sum(dropped[name].values()) == len(samples)
        for pack in packs:
            layouts = pack.layouts(plan) or [plan.plan(16, 16) for _ in pack.images]
            slots = int((pack.tokens == tokenizer.imgpad_id).sum())
            assert slots == sum(layout.tokens for layout in layouts)
    broken = {"bad image (broken header)": 1, "bad image (too large)": 1, "image missing": 1}
    assert dropped["squash"] == broken
    assert dropped["crop"] == broken | {"bad image (too narrow)": 1} or CropPlan(16, 4, short_side=16).plan(10000, 1)
    assert dropped["anyres"] == broken | {"too long": 1}


def test_a_plan_that_cannot_have_a_picture_says_which() -> None:
    tall = encode_image(smooth_image(2, 1, 10000), "PNG")
    plan = CropPlan(336, 576, short_side=336)
    with pytest.raises(
        ImageError, match="too narrow: image 2: too narrow: 1 x 10000 pixels would become 336 x 3360000"
    ):
        lay_out([encode_image(smooth_image(1, 40, 20)), tall], plan)
    assert image_runs(plan, 2, lambda: pytest.fail("not asked for")) == [(576,)] * 2
    decoded = make_decoder("pil").decode([tall], plan)
    assert (decoded.failed, decoded.causes) == ([0], ["too narrow"])


def test_the_right_segment_loses_its_labels(tmp_path: Path, tokenizer: Tokenizer, decoder: ImageDecoder) -> None:
    """A picture of several views that cannot be decoded stands between others."""
    rng = np.random.default_rng(0)
    noisy = encode_image(Image.fromarray(rng.integers(0, 255, (30, 60, 3), dtype=np.uint8)))
    cut = noisy[: len(noisy) // 3]
    good = encode_image(smooth_image(1, 20, 40))
    images = [[good], [], [good, cut], [good]]
    samples = [{"json": record(len(files)), **{f"img{i}": data for i, data in enumerate(files)}} for files in images]
    reader = open_reader(
        [write_raw(tmp_path / "d", samples)], tokenizer, plan=SMALL, training=False, sequence_length=512
    )
    pack = next(iter(reader))
    two = [ImageShape(20, 40, 2), ImageShape(60, 30, 2)]
    assert pack.image_shapes == [ImageShape(20, 40), *two, ImageShape(20, 40)]
    whole = pack.labels.copy()
    read = decode_pack(pack, decoder, SMALL, tokenizer.imgpad_id)
    broken = pack.sample_keys.index("d/s-00002")
    ((key, cause),) = [(sample.key, sample.cause) for sample in read.masked]
    assert key == "s-00002" and cause.startswith("bad image (")
    start, end = pack.cu_seqlens[broken : broken + 2]
    assert (pack.labels[start:end] == IGNORE_INDEX).all() and (whole[start:end] != IGNORE_INDEX).any()
    assert np.array_equal(np.delete(pack.labels, np.s_[start:end]), np.delete(whole, np.s_[start:end]))
    layouts = pack.layouts(SMALL)
    assert layouts is not None and read.pixels.shape[0] == sum(len(layout.views) for layout in layouts)
    assert read.arrangement is not None and read.arrangement.features == 4 * read.pixels.shape[0]
    assert read.arrangement.index is not None
    assert len(read.arrangement.index) == int((pack.tokens == tokenizer.imgpad_id).sum())


def test_a_reader_of_tiles_goes_on_exactly(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(1)
    samples = []
    for index in range(60):
        size = tuple(int(one) for one in rng.integers(8, 60, 2))
        samples.append({"json": record(1, f"what {index}"), "img0": encode_image(smooth_image(index, *size))})
    data = write_raw(tmp_path / "d", samples)

    def opened(state: Any = None, plan: ImagePlan = SMALL) -> Prefetcher:
        reader = open_reader([data], tokenizer, plan=plan, sequence_length=256)
        return Prefetcher(reader, make_decoder("pil"), plan, tokenizer.imgpad_id, depth=2, state=state)

    def taken(feed: Prefetcher, count: int) -> Iterator[tuple[Any, ...]]:
        for item in (feed.take() for _ in range(count)):
            yield item.pack.tokens.tobytes(), item.pixels.numpy().tobytes(), item.pack.image_shapes

    one = opened()
    first = list(taken(one, 3))
    state = json.loads(json.dumps(one.state()))
    rest = list(taken(one, 4))
    one.close()
    two = opened(state)
    assert list(taken(two, 4)) == rest and first[0] != rest[0]
    two.close()
    with pytest.raises(
        UserError, match=r"images .AnyresPlan.*\(32, 32\).* has .AnyresPlan.*set it back, or begin another"
    ):
        opened(state, AnyresPlan(16, 4, pinpoints=((16, 32), (32, 16))))
    views = Counter(len(SMALL.plan(*shape).views) for item in rest for shape in item[2])
    assert len(views) > 1


@pytest.mark.parametrize("choose", [make_decoder], ids=["auto"])
def test_no_images_and_many(choose: Callable[[str], ImageDecoder]) -> None:
    plan, decoder = PLANS["dynamic_tiles"], choose("auto")
    assert decoder.decode([], plan, []).pixels.shape == (0, 3, SIDE, SIDE)
    data = encode_image(smooth_image(1, 300, 100))
    assert decoder.decode([data] * 40, plan, lay_out([data], plan) * 40).pixels.shape == (40 * 4, 3, SIDE, SIDE)
