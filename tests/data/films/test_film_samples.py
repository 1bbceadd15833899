"""Films from records to packs: prepare, shards, tokens, pixels."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import encode_image, prepare, smooth_image
from film_maker import film, film_recipe

from megavlm.config.schema import DataConfig, DataSource, Recipe
from megavlm.data import shard_reader
from megavlm.data.batch import IGNORE_INDEX, Pack
from megavlm.data.decoders import make_decoder
from megavlm.data.films import source
from megavlm.data.films.container import write_frames
from megavlm.data.films.film import Film
from megavlm.data.films.plan import FilmShape
from megavlm.data.films.read import frames_of
from megavlm.data.films.source import FilePart
from megavlm.data.media import ImageShape, plan_of
from megavlm.data.patches import patches_of
from megavlm.data.plans_native import NativePlan
from megavlm.data.positions import positions_of
from megavlm.data.preparing import Preparation, write_samples
from megavlm.data.read_pack import decode_pack, image_starts
from megavlm.data.reader import PackReader
from megavlm.data.render import resized
from megavlm.data.schema import FILM_PLACEHOLDER
from megavlm.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Films ``0.mp4`` to ``3.webm``, a folder of frames, pictures, and what is none."""
    folder = tmp_path_factory.mktemp("media")
    for number, (frames, kind, codec) in enumerate(
        [(12, "mp4", "libx264"), (31, "mov", "mpeg4"), (1, "mp4", "libx264"), (20, "webm", "libvpx-vp9")]
    ):
        (folder / f"{number}.{kind}").write_bytes(film(frames, kind, codec))
    (folder / "walk").mkdir()
    for number in range(11):
        (folder / "walk" / f"f{number}.png").write_bytes(encode_image(smooth_image(number, 40, 30), "PNG"))
    (folder / "a.png").write_bytes(encode_image(smooth_image(1, 40, 30), "PNG"))
    (folder / "sound.mp4").write_bytes(film(0, sound=True))
    (folder / "junk.mp4").write_bytes(b"junk" * 100)
    return folder


def llava(text: str, **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "A thing."}], **more}


def messages(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A thing."}], **more}


def parts(*first: dict[str, Any]) -> list[dict[str, Any]]:
    return [*first, {"type": "text", "text": "What?"}]


def shards(root: Path, records: list[Any], media: Path) -> tuple[list[dict[str, bytes]], list[str]]:
    """Prepare records; return each sample's files, and the causes of what was rejected."""
    last = messages("?") if "messages" in records[0] else llava("?")  # a data set of nothing is not written
    out = prepare(root, [*records, last], name="d", images=media)
    reader = shard_reader.open_shards(str(out))
    samples = [{key: value for key, value in reader[i].items() if not key.startswith("__")} for i in range(len(reader))]
    rejected = [json.loads(line)["cause"] for line in (out / "rejected.jsonl").read_text().splitlines()]
    return samples[:-1], rejected


def data_url(path: Path, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{b64encode(path.read_bytes()).decode()}"


def forms(media: Path) -> dict[str, dict[str, Any]]:
    """One record of each form, all of which show ``0.mp4`` in front of a question."""
    url = data_url(media / "0.mp4")
    return {
        "LLaVA": llava("<video>\nWhat?", video="0.mp4"),
        "LLaVA-Video's <image>": llava("<image>\nWhat?", video="0.mp4"),
        "LLaMA-Factory": llava("<video>What?", videos=["0.mp4"]),
        "absolute": llava("<video>What?", videos=[str(media / "0.mp4")]),
        "data URL": llava("<video>What?", videos=[url]),
        "ms-swift": messages("<video>What?", videos=["0.mp4"]),
        "without a place": messages("What?", videos=["0.mp4"]),
        "video part": messages(parts({"type": "video", "video": f"file://{media / '0.mp4'}"})),
        "video in order": messages(parts({"type": "video"}), videos=["0.mp4"]),
        "video_url": messages(parts({"type": "video_url", "video_url": {"url": url}})),
        "bytes": messages(parts({"type": "video", "base64": url.partition(",")[2]})),
    }


def test_every_form_of_a_record_becomes_the_same_sample(media: Path, tmp_path: Path) -> None:
    samples = {}
    for key in ("conversations", "messages"):
        (tmp_path / key).mkdir()
        own = {name: record for name, record in forms(media).items() if key in record}
        found, rejected = shards(tmp_path / key, list(own.values()), media)
        assert not rejected
        samples |= dict(zip(own, found, strict=True))
    for name, sample in samples.items():
        part = sample["film0"]
        assert isinstance(part, FilePart), name
        data = Path(part.path).read_bytes()[part.offset : part.offset + part.size]
        assert data == (media / "0.mp4").read_bytes(), name
        assert sample.keys() == {"json", "film0", "filmindex0"}
        text = json.loads(sample["json"])["conversations"][0]["value"]
        assert text == f"Video 1: {FILM_PLACEHOLDER}\nWhat?", name


def test_bytes_in_a_record_are_films_and_frames(media: Path, tmp_path: Path) -> None:
    url = data_url(media / "0.mp4")
    frames = [data_url(media / "walk" / f"f{number}.png", "image/png") for number in range(3)]
    records = [
        llava("<video>What?", videos=[{"base64": url.partition(",")[2]}]),
        llava("<video>What?", video={"bytes": url.partition(",")[2]}),
        llava("<video>What?", video=frames),
        llava("<video>What?", videos=[{"frames": frames, "fps": 3}]),
        llava("<video>What?", videos=[frames]),
    ]
    samples, rejected = shards(tmp_path, records, media)
    assert not rejected
    shapes = [Film(one["film0"], one["filmindex0"]).index().shape()[2:] for one in samples]
    assert shapes == [(12, 10.0, 1, False)] * 2 + [(3, 2.0, 1, True), (3, 3.0, 1, True), (3, 2.0, 1, True)]


def test_a_rate_of_zero_and_no_frames_are_rejected(media: Path, tmp_path: Path) -> None:
    records = [
        llava("<video>What?", videos=[{"frames": ["walk/f0.png"], "fps": 0}]),
        llava("<video>What?", videos=[[]]),
    ]
    assert shards(tmp_path, records, media) == ([], ["bad record"] * 2)


def test_films_of_a_tar(media: Path, tmp_path: Path) -> None:
    records = {
        "a": (messages("What?"), {"mp4": media / "0.mp4"}),
        "b": (messages("<video>What?", videos=["b.mov"]), {"mov": media / "1.mov", "png": media / "a.png"}),
        "c": (messages("<video>What?", video=["0.png", "1.png"]), {f"{n}.png": media / "a.png" for n in range(2)}),
    }
    records["b"][0]["images"] = ["png"]
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        for key, (record, files) in records.items():
            contents = {"json": json.dumps(record).encode()} | {name: at.read_bytes() for name, at in files.items()}
            for name, content in contents.items():
                member = tarfile.TarInfo(f"{key}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    write_samples(Preparation(tmp_path / "d.tar"), tmp_path)
    (shard,) = tmp_path.glob("*-0*.tar")
    with tarfile.open(shard) as tar:
        held = [member.name.partition(".")[2] for member in tar]
    film = ["film0", "filmindex0"]
    assert held == ["json", *film, "json", "img0", *film, "json", *film]


def test_frames_in_a_folder_or_a_list(media: Path, tmp_path: Path) -> None:
    listed = [f"walk/f{number}.png" for number in (0, 1, 2)]
    records = [
        llava("<video>\nWhat?", video="walk"),
        llava("<video>\nWhat?", video=listed),
        llava("<video>\nWhat?", videos=[{"frames": listed, "fps": 4}]),
        llava("<video>\nAnd <image>?", videos=["walk"], image="a.png"),
    ]
    samples, rejected = shards(tmp_path, records, media)
    assert not rejected
    indices = [Film(one["film0"], one["filmindex0"]).index() for one in samples]
    assert [one.shape()[2:] for one in indices] == [(11, 2.0, 1, True), (3, 2.0, 1, True), (3, 4.0, 1, True),
                                                    (11, 2.0, 1, True)]  # fmt: skip
    first = next(iter(frames_of(Film(samples[0]["film0"]), [10])))
    assert np.array_equal(first.permute(1, 2, 0).numpy(), np.array(smooth_image(10, 40, 30)))
    assert samples[3].keys() == {"json", "img0", "film0", "filmindex0"}


BAD = {
    "films do not match": [
        llava("<video><video>?", video="0.mp4"), llava("What?", video="0.mp4"), llava("<video>What?"),
        llava("<video>?", video="0.mp4", videos=["1.mov"]),
    ],
    "film missing": [llava("<video>?", video="no.mp4")],
    "unsafe image path": [llava("<image>?", image="../film 1: film x.png")],
    "unsafe film path": [llava("<video>?", video="../x.mp4"), llava("<video>?", video="https://a.org/x.mp4")],
    "bad film (not a film)": [llava("<video>?", video="junk.mp4")],
    "bad film (no pictures)": [llava("<video>?", video="sound.mp4")],
    "unsupported key": [llava("<video>?", videos=[{"path": "0.mp4", "video_start": 3}])],
    "bad record": [llava("<video>?", videos=[3])],
    "frame missing": [llava("<video>?", video=["walk/f0.png", "walk/no.png"])],
}  # fmt: skip


def test_what_cannot_be_shown_is_rejected_by_its_cause(media: Path, tmp_path: Path) -> None:
    records = [record for some in BAD.values() for record in some]
    samples, rejected = shards(tmp_path, records, media)
    assert samples == [] and rejected == [cause for cause, some in BAD.items() for _ in some]


ASKS = ("nframes", "num_frames", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels",
        "resized_height", "resized_width", "video_start", "video_end", "start_time", "end_time", "fps", "sample_fps",
        "rate")  # fmt: skip
"""Keys of an object by which it says how its film is shown."""


def test_frames_and_sizes_of_its_own_are_refused_by_name(media: Path, tmp_path: Path) -> None:
    """Wherever the object stands; a rate is that of a folder of frames, and what nobody looks at is told."""
    url = data_url(media / "0.mp4")
    for number, places in enumerate((
        lambda own: [
            llava("<video>?", video={"path": "0.mp4"} | own), llava("<video>?", videos=[{"video": url} | own]),
        ],
        lambda own: [
            messages("<video>?", videos=[{"video_url": {"url": url} | own}]),
            messages(parts({"type": "video", "video": "0.mp4"} | own)),
            messages(parts({"type": "video_url", "video_url": {"url": url} | own})),
            messages(parts({"type": "video"} | own), videos=["0.mp4"]),
        ],
    )):  # fmt: skip
        (tmp_path / str(number)).mkdir()
        records = [record for key in ASKS for record in places({key: 2})]
        out = prepare(tmp_path / str(number), [*records, places({})[0]], name="d", images=media)
        rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
        assert [one["cause"] for one in rejected] == ["unsupported key"] * len(records)
        named = [key for key in ASKS for _ in places({})]
        assert all(key in one["reason"] for key, one in zip(named, rejected, strict=True))


def test_a_rate_of_a_folder_of_frames_is_honoured(media: Path, tmp_path: Path) -> None:
    records = [llava("<video>?", video={"path": "walk", key: 5}) for key in ("fps", "sample_fps", "rate")]
    samples, rejected = shards(tmp_path, records, media)
    assert not rejected
    assert [Film(one["film0"]).index().rate for one in samples] == [5.0] * 3


def test_keys_of_a_film_that_nobody_looks_at_are_told(
    media: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(tmp_path, [llava("<video>?", video={"path": "0.mp4", "duration": 3})], name="d", images=media)
    assert "duration (of a film) (1 records)" in caplog.text


def test_html_is_no_film(media: Path, tmp_path: Path) -> None:
    text = "Does <video></video> play?"
    (sample,), rejected = shards(tmp_path, [llava(text)], media)
    assert not rejected and json.loads(sample["json"])["conversations"][0]["value"] == text


def test_large_samples_are_read_without_their_films(
    media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [llava("<video>\nAnd <image>?", video="0.mp4", image="a.png")]
    small, _ = shards(tmp_path, records, media)
    seen: list[tuple[int, int]] = []
    own = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: seen.append((at, size)) or own(file, size, at))
    monkeypatch.setattr(source, "_BUFFER", 512)
    monkeypatch.setattr(shard_reader, "_LARGE", 0)
    part = small[0]["film0"]
    assert isinstance(part, FilePart)
    large = shard_reader.open_shards(str(Path(part.path).parent))[0]
    assert {key: large[key] for key in small[0]} == small[0]
    assert seen and not any(part.offset + 512 <= at < part.offset + part.size - 512 for at, _ in seen)
    with Path(part.path).open("r+b") as shard:  # the header of the film's own entry
        shard.seek(part.offset - 512)
        shard.write(b"x" * 300)
    assert shard_reader.open_shards(str(Path(part.path).parent))[0][shard_reader.DEFECT] == shard_reader.BROKEN


def mixed(count: int) -> list[dict[str, Any]]:
    """Records with films, pictures, both, and neither."""
    draw, found = random.Random(5), []
    for number in range(count):
        record = llava("", id=number)
        shown = ""
        if number % 3 == 0:
            record["videos"] = [draw.choice(["0.mp4", "1.mov", "2.mp4", "3.webm", "walk"])]
            shown += "<video>\n"
        if number % 4 == 0:
            record["images"] = ["a.png"]
            shown = shown + "<image>\n" if number % 8 else "<image>\n" + shown
        record["conversations"][0]["value"] = f"{shown}What is {number}?"
        found.append(record)
    return found


def reader(own: Recipe, data: Path, tokenizer: Tokenizer, **options: Any) -> PackReader:
    keys = {"sequence_length": 256, "num_workers": 0, "packing_buffer_size": 12, "shuffle_buffer_size": 8, **options}
    sources = (DataSource(path=str(data)),)
    return PackReader(
        sources, DataConfig(train=sources, tokenizer="unused", **keys), tokenizer, plan_of(own.model),
        positions_of(own.model, tokenizer.imgpad_id), rank=0, world_size=1, seed=3, training=True,
    )  # fmt: skip


def test_packs_with_films_are_exact_and_go_on_where_they_were(
    media: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    own = film_recipe()
    plan = plan_of(own.model)
    assert isinstance(plan, NativePlan)
    data = prepare(tmp_path, mixed(40), name="mix", images=media)
    first = reader(own, data, tokenizer)
    packs = [next(first) for _ in range(6)]
    state = first.state()
    kinds = {type(shape) for pack in packs for shape in pack.image_shapes}
    assert kinds == {ImageShape, FilmShape} and not any(pack.skipped for pack in packs)
    decoder = make_decoder("pil")
    for pack in packs:
        layouts = pack.layouts(plan)
        assert layouts is not None
        assert (pack.tokens == tokenizer.imgpad_id).sum() == sum(one.tokens for one in layouts)
        assert pack.position_ids.shape == (3, 256)
        read = decode_pack(pack, decoder, plan, tokenizer.imgpad_id)
        assert not read.masked and read.arrangement is not None
        grid = read.arrangement.grid
        assert grid is not None and len(grid) == len(pack.images)
        assert int(grid.prod(1).sum()) == len(read.pixels)
        # A film alone has the pixels that it has among others.
        at = 0
        for data_of, layout in zip(pack.images, layouts, strict=True):
            alone = decoder.decode([data_of], plan, [layout]).pixels
            assert torch.equal(alone, read.pixels[at : at + len(alone)])
            at += len(alone)
    second = reader(own, data, tokenizer)
    second.restore(state)
    for _ in range(4):
        assert same(next(first), next(second))
    again = reader(own, data, tokenizer).restore_pack(packs[2].restore_key)
    assert same(again, packs[2])


def same(one: Pack, other: Pack) -> bool:
    arrays = ("tokens", "labels", "position_ids", "cu_seqlens")
    equal = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays)
    return equal and one.images == other.images and one.image_shapes == other.image_shapes


def test_patches_of_two_frames_and_an_odd_one(media: Path) -> None:
    plan = plan_of(film_recipe(max_frames=768).model)
    assert isinstance(plan, NativePlan) and plan.films is not None
    out = io.BytesIO()
    write_frames([media / "walk" / f"f{number}.png" for number in range(5)], 2.0, out)
    one = Film(out.getvalue())
    layout = plan.of(one.shape())
    assert layout.patches is not None and layout.patches[0] == 3
    found = make_decoder("pil").decode([one], plan, [layout]).pixels.view(3, -1, 3, 2, 16)
    size = layout.canvases[0].resized
    frames = [resized(frame, size, "bicubic", exact_type=False) for frame in frames_of(one, range(5))]
    for step in range(3):
        for half in range(2):
            alone = patches_of(frames[min(2 * step + half, 4)], plan).view(-1, 3, 2, 16)[:, :, 0]
            assert torch.equal(found[step, :, :, half], alone)


def test_a_film_that_cannot_be_decoded_costs_its_own_sample(media: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    own = film_recipe()
    data = prepare(tmp_path, [llava("<video>\nWhat?", video="0.mp4")] * 6, name="films", images=media)
    pack = next(reader(own, data, tokenizer, sequence_length=512))
    films = [one for one in pack.images if isinstance(one, Film)]
    assert len(films) > 1
    good = films[1]
    assert isinstance(good.data, FilePart)
    body = bytearray(Path(good.data.path).read_bytes()[good.data.offset : good.data.offset + good.data.size])
    body[60:-1200] = bytes(len(body[60:-1200]))
    pack.images[1] = Film(bytes(body), good.stored)
    read = decode_pack(pack, make_decoder("pil"), plan_of(own.model), tokenizer.imgpad_id)
    assert [one.cause.partition("(")[0] for one in read.masked] == ["bad film "]
    starts, bounds = image_starts(pack, plan_of(own.model), tokenizer.imgpad_id), pack.cu_seqlens
    for number in range(len(films)):
        segment = int(np.searchsorted(bounds, starts[number], side="right")) - 1
        labels = pack.labels[bounds[segment] : bounds[segment + 1]]
        assert bool((labels != IGNORE_INDEX).any()) == (number != 1)


def test_a_model_without_films_counts_them(media: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    own = film_recipe(kind="none", min_pixels=None, max_pixels=None, max_frames=None, tokens_per_second=None)
    data = prepare(tmp_path, mixed(12), name="mix", images=media)
    found = reader(own, data, tokenizer)
    for _ in range(3):
        next(found)
    assert set(found.dropped) == {"bad film (not read)"}
