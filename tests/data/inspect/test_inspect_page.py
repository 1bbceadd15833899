"""The page shows what is trained, and nothing in the data can make it do anything."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import TOKENS_PER_IMAGE, encode_image, open_reader, prepare, write_raw
from PIL import Image
from run_data import RunData
from tokenizer_files import write_llama, write_llava, write_qwen2, write_tiktoken

from megavlm import cli
from megavlm.checkpoint.assets import write_record
from megavlm.commands.inspect import _space
from megavlm.config.load import load_recipe
from megavlm.data.batch import IGNORE_INDEX
from megavlm.data.box_space import BoxSpace
from megavlm.data.chat import encode_conversation
from megavlm.data.decoders import make_decoder
from megavlm.data.device_batch import make_batch
from megavlm.data.feed import Prefetcher
from megavlm.data.inspect.tokens import segments, shapes
from megavlm.data.media import plan_of
from megavlm.data.packing import PackableSample, build_pack
from megavlm.data.plans_single import PadPlan, SquashPlan
from megavlm.data.reader import PackReader
from megavlm.data.schema import parse_conversation
from megavlm.data.tokenizer import Tokenizer, load_tokenizer
from megavlm.families.presets import expand_presets

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&lt;b&gt;"
HAN = "\u4e00\u53ea\u957f\u9888\u9e7f"


class Page(HTMLParser):
    """Tags with their attributes, and the text that a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, **attributes: str) -> int:
        return sum(all(attrs.get(key) == value for key, value in attributes.items()) for _, attrs in self.tags)


def chat(prompt: str, answer: str, **more: str) -> dict:
    turns = [{"from": "user", "value": prompt}, {"from": "assistant", "value": answer}]
    return {"conversations": turns} | more


@pytest.fixture
def images(tmp_path: Path) -> Path:
    directory = tmp_path / "images"
    directory.mkdir()
    (directory / "a.jpg").write_bytes(encode_image(Image.new("RGB", (64, 48), (200, 30, 30))))
    return directory


def inspect(out: Path, *words: object, tokenizer: Path | None) -> tuple[int, Page]:
    own = [] if tokenizer is None else ["--tokenizer", tokenizer]
    code = cli.main(["inspect", *map(str, [*words, "-o", out, *own])])
    return code, Page(out.read_text(encoding="utf-8") if code == 0 else "")


def test_markup_in_the_data_stays_text(tmp_path: Path, images: Path, tokenizer_path: Path) -> None:
    records = [chat(f"<img>a.jpg</img>{EVIL}", f"<ref>{EVIL.replace('<', '[')}</ref><box>(1,2),(30,40)</box> {EVIL}",
                    task=EVIL)]  # fmt: skip
    shards = prepare(tmp_path, records, name="<b onclick=x>", images=images)
    words = (shards, "--tokens-per-image", 6, "--sequence-length", 1024, "--packs", 1)
    code, page = inspect(tmp_path / "page.html", *words, tokenizer=tokenizer_path)
    assert code == 0
    names = Counter(tag for tag, _ in page.tags)
    assert not {"script", "iframe", "object", "link", "base", "form"} & names.keys()
    assert names["img"] >= 2  # the picture in its sample and in its pack
    for tag, attrs in page.tags:
        assert not [key for key in attrs if key.startswith("on") or key in ("href", "action", "srcset")], (tag, attrs)
        assert tag != "img" or (attrs["src"] or "").startswith("data:image/jpeg;base64,")
    assert EVIL in page.text  # the task; the tokens have it too, with borders in between
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"(?:https?:)?//[a-z]", re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL))


def test_pieces_are_exactly_the_tokens_and_labels_of_the_pack(
    two_datasets: tuple[Path, Path], tokenizer: Tokenizer
) -> None:
    reader = open_reader(two_datasets, tokenizer)
    for _ in range(4):
        pack = next(reader)
        parts = segments(pack, tokenizer, SquashPlan(16, TOKENS_PER_IMAGE))
        assert [part.end for part in parts] == pack.cu_seqlens[1:].tolist()
        assert [part.key for part in parts if part.source >= 0] == pack.sample_keys
        assert [image for part in parts for image in part.images] == pack.images
        assert sum(part.supervised for part in parts) == pack.supervised_tokens > 0
        for part in parts:
            if part.source < 0:
                continue
            tokens = pack.tokens[part.start : part.end].tolist()
            assert [i for piece in part.pieces for i in piece.ids] == tokens
            flags = [piece.supervised for piece in part.pieces for _ in piece.ids]
            # What the loss counts at a position is the token behind it.
            labels = pack.labels[part.start : part.end - 1]
            assert flags == [False, *(labels != IGNORE_INDEX).tolist()]
            assert np.array_equal(labels[flags[1:]], np.array(tokens)[flags])
            written = "".join(piece.text for piece in part.pieces if piece.image is None)
            assert written == tokenizer.decode([i for i in tokens if i != tokenizer.imgpad_id])
            slots = [len(piece.ids) for piece in part.pieces if piece.image is not None]
            assert slots == [TOKENS_PER_IMAGE] * len(part.images)


def test_characters_of_several_tokens_are_one_piece(tmp_path: Path, images: Path, tokenizer: Tokenizer) -> None:
    shards = prepare(tmp_path, [chat(HAN, HAN)], name="han", images=images)
    (part, *_) = segments(next(open_reader([shards], tokenizer)), tokenizer, SquashPlan(16, TOKENS_PER_IMAGE))
    written = [piece for piece in part.pieces if piece.text in HAN]
    assert [(piece.text, len(piece.ids)) for piece in written] == [(char, 3) for char in HAN * 2]
    assert [piece.supervised for piece in written] == [False] * len(HAN) + [True] * len(HAN)


def test_shapes() -> None:
    text = "<ref>a cat</ref><box>(10,20),(30,40)</box>, <quad>(1,2),(3,4),(5,6),(7,8)</quad><box>(1,2)</box>"
    box, quad = shapes(text)
    assert (box.kind, box.name, box.points) == ("box", "a cat", ((10, 20), (30, 20), (30, 40), (10, 40)))
    assert (quad.kind, quad.name, quad.points) == ("quad", "", ((1, 2), (3, 4), (5, 6), (7, 8)))
    # What a question names is the name of the box that answers it.
    asked = (
        "Where is <ref>the dog</ref><|im_end|>\n<|im_start|>assistant\n<box>(1,2),(3,4)</box> or <box>(5,6),(7,8)</box>"
    )
    assert [shape.name for shape in shapes(asked)] == ["the dog", ""]
    # The same box in the notations of other families.
    corners = ((100, 200), (500, 200), (500, 750), (100, 750))
    for said, name in (
        ("<ref>a cat</ref><box>(100,200),(500,750)</box>", "a cat"),
        ("[INST] [refer] a cat [/INST] {<10><20><50><75>}</s>", ""),
        ("<p>a cat</p>{<10><20><50><75>}", "a cat"),
        ("Where is a cat? answer in [[x0,y0,x1,y1]] format. [[100,200,500,750]]", ""),
    ):
        assert [(shape.name, shape.points) for shape in shapes(said)] == [(name, corners)], said


def test_numbers_of_boxes_count_what_the_family_says(tmp_path: Path, tokenizer: Tokenizer, run_data: RunData) -> None:
    """LLaVA's are parts of the square that a picture is padded to: one of 2 to 1 lies from a quarter of its height."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "wide.jpg").write_bytes(encode_image(Image.new("RGB", (200, 100)), "JPEG"))
    record = chat("<img>wide.jpg</img>Where?", "[0.25, 0.375, 0.75, 0.625]")
    shards = prepare(tmp_path, [record], name="wide", images=tmp_path / "images")
    plan = PadPlan(16, TOKENS_PER_IMAGE)
    pack = next(open_reader([shards], tokenizer))
    for space, first in ((BoxSpace(plan, plane=True), (250, 250)), (None, (250, 375))):
        (part, *_) = segments(pack, tokenizer, plan, space)
        assert [shape.points[0] for shape in part.shapes] == [first]
    # Whose the recipe's checkpoint is: its own directory, or what checkpoint.load names, as far as it is there.
    step = tmp_path / "step-00000001"
    step.mkdir()
    (step / "run.json").write_text("{}")
    write_record(step, {"family": "llava"})
    own = run_data.recipe(tmp_path)
    loaded = run_data.recipe(tmp_path, f"checkpoint.load={step}")
    later = run_data.recipe(tmp_path, f"checkpoint.load={tmp_path / 'later'}")
    found = [
        _space(own, step),
        _space(loaded, Path("a.yaml")),
        _space(later, Path("a.yaml")),
        _space(own, Path("tiny")),
    ]
    assert [one.plane for one in found] == [True, True, False, False]


def test_figures_of_the_page(tmp_path: Path, images: Path, tokenizer_path: Path) -> None:
    sound = [chat("<img>a.jpg</img>Where?", "<ref>cat</ref><box>(100,200),(300,400)</box>", task="box")] * 5
    shards = prepare(tmp_path, [*sound, chat("Hi.", "long " * 300), chat("Hello.", "You.")], name="a", images=images)
    broken = write_raw(tmp_path / "raw", [{"json": json.dumps(chat("<img>a.jpg</img>", "x")).encode(), "img0": b"?"}])
    words = (shards, broken, "--tokens-per-image", 6, "--sequence-length", 192, "--samples", 3, "--packs", 2)
    code, page = inspect(tmp_path / "page.html", *words, tokenizer=tokenizer_path)
    assert code == 0
    rows = re.findall(r"<tr><td title.*?</tr>", (tmp_path / "page.html").read_text(encoding="utf-8"))
    cells = [re.sub(r"<[^>]*>", " ", row).split() for row in rows]
    assert [row[:4] for row in cells] == [["a", "7", "7", "1"], ["raw", "1", "1", "1"]]
    for text in (
        "too long",
        "bad image (not an image)",
        "(none)",
        "task box",
        "sample 3",
        "pack 2",
        "segment 2",
        "a/a-00000005: too long",
        "raw/s-00000: bad image (not an image)",
    ):
        assert text in page.text, text
    assert "sample 4" not in page.text
    assert "pack 3" not in page.text
    assert page.count(points="100,200 300,200 300,400 100,400") >= 2


def test_a_page_keeps_to_its_size(tmp_path: Path, images: Path, tokenizer_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    (images / "n.jpg").write_bytes(encode_image(Image.fromarray(noise)))
    shards = prepare(tmp_path, [chat("<img>n.jpg</img>What?", "Noise.")] * 20, name="a", images=images)
    out = tmp_path / "page.html"
    words = (shards, "--samples", 20, "--packs", 2, "--tokens-per-image", 6, "--sequence-length", 192)
    assert inspect(out, *words, tokenizer=tokenizer_path)[0] == 0
    assert out.stat().st_size > 1_000_000
    code, page = inspect(out, *words, "--max-mb", 0.3, tokenizer=tokenizer_path)
    assert code == 0
    assert out.stat().st_size <= 300_000
    assert re.search(r"[1-9] of 20 are shown: a page may have 0.3 MB", page.text)


class PackPage(HTMLParser):
    """What the page shows of each pack: per segment its token ids with whether they are supervised, and its notes."""

    def __init__(self, html: str, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.packs: list[list[list[tuple[int, bool]]]] = []
        self.notes: list[str] = []
        self._imgpad, self._inside, self._slots, self._note = tokenizer.imgpad_id, False, False, False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        classes = (found.get("class") or "").split()
        if tag == "article":
            self._inside = (found["id"] or "").startswith("pack-")
            self.packs += [[]] if self._inside else []
        elif self._inside and "segment" in classes:
            self.packs[-1].append([])
        elif self._inside and tag == "span" and "t" in classes:
            ids = [int(i) for i in (found.get("title") or "").split(",") if i]
            self.packs[-1][-1] += [(i, "s" in classes) for i in ids]
            self._slots = "i" in classes
        self._note = self._inside and "note" in classes

    def handle_data(self, data: str) -> None:
        if self._slots:
            match = re.search(r"(\d+) slots", data)
            assert match is not None
            self.packs[-1][-1] += [(self._imgpad, False)] * int(match[1])
            self._slots = False
        elif self._note:
            self.notes.append(data)
            self._note = False


@pytest.mark.parametrize("workers", [0, 1])
def test_the_page_shows_the_batches_of_the_trainer(workers: int, run_data, tmp_path: Path) -> None:
    """Tokens, label mask and borders, read off the page, are those of the micro-batches that a run would take."""
    whole = encode_image(Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)))
    cut = {"json": json.dumps(chat("<img>a.jpg</img>What?", "Noise, much of it.")).encode(), "img0": whole[:-900]}
    broken = write_raw(tmp_path / "broken", [cut] * 3)
    text = (run_data.root / "recipe.yaml").read_text().replace("num_workers: 0", f"num_workers: {workers}")
    source = f"  - {{path: {broken}, name: broken}}\n  validation:"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text.replace("validation:", source, 1))
    out = tmp_path / "page.html"
    words = ("--recipe", recipe, "--packs", 5, "--data-parallel", 2, "--samples", 0)
    assert inspect(out, *words, tokenizer=None)[0] == 0

    loaded = load_recipe(str(recipe), [], expand_presets)
    tokenizer = load_tokenizer(loaded.data.tokenizer)
    plan = plan_of(loaded.model)
    reader = PackReader(loaded.data.train, loaded.data, tokenizer, plan, rank=0, world_size=2,
                        seed=loaded.training.seed, training=True)  # fmt: skip
    prefetcher = Prefetcher(reader, make_decoder(), plan, tokenizer.imgpad_id, depth=2)
    reads = [prefetcher.take() for _ in range(5)]
    prefetcher.close()
    shown = PackPage(out.read_text(encoding="utf-8"), tokenizer)
    assert len(shown.packs) == 5
    for read, segments_shown in zip(reads, shown.packs, strict=True):
        batch = make_batch(read.pack, read.pixels, torch.device("cpu"))
        tokens, labels = batch.tokens[0].tolist(), batch.labels[0].tolist()
        borders = batch.packed_seq_params.cu_seqlens_q.tolist()
        assert len(segments_shown) == len(borders) - 1
        for start, end, pieces in zip(borders[:-1], borders[1:], segments_shown, strict=True):
            if not pieces:  # padding
                assert set(labels[start:end]) == {IGNORE_INDEX}
                assert end == len(tokens)
                continue
            assert [i for i, _ in pieces] == tokens[start:end]
            flags = [label != IGNORE_INDEX for label in labels[start : end - 1]]
            assert [flag for _, flag in pieces] == [False, *flags]
    masked = [skipped for read in reads for skipped in read.masked]
    assert len(masked) == len(shown.notes) > 0
    assert set(shown.notes) == {f"Nothing of it is trained on: {skipped.cause}." for skipped in masked}


def test_a_recipe_without_a_tokenizer_takes_that_of_the_checkpoint(
    run_data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = re.sub(r"tokenizer: .*", "tokenizer: null", (run_data.root / "recipe.yaml").read_text())
    recipe.write_text(text)
    words = ("--recipe", recipe, "--samples", 1, "--packs", 0)
    assert inspect(tmp_path / "page.html", *words, tokenizer=None)[0] == 2
    assert capsys.readouterr().err == (
        f"megavlm: error: --tokenizer is missing: data.tokenizer of {recipe} is null, and its checkpoint.load as well; "
        "give a tokenizer file\n"
    )
    recipe.write_text(f"{text}\ncheckpoint: {{load: {tmp_path}}}\n")
    assert inspect(tmp_path / "page.html", *words, tokenizer=None)[0] == 2
    assert f"its checkpoint.load, {tmp_path}, has no checkpoint; give a tokenizer file" in capsys.readouterr().err
    checkpoint = tmp_path / "step-00000007"
    (checkpoint / "hf").mkdir(parents=True)
    (checkpoint / "run.json").write_text(json.dumps({"recipe": {}}))
    shutil.copy(run_data.root / "tokenizer.model", checkpoint / "hf")
    recipe.write_text(f"{text}\ncheckpoint: {{load: {checkpoint}}}\n")
    code, page = inspect(tmp_path / "page.html", *words, tokenizer=None)
    assert code == 0
    assert f"tokenizer {checkpoint}/hf/tokenizer.model" in page.text
    # A run's directory means the recipe of its newest checkpoint.
    shutil.copy(recipe, checkpoint)
    words = ("--recipe", tmp_path, *words[2:])
    assert inspect(tmp_path / "page.html", *words, tokenizer=None)[0] == 0


def test_a_recipe_says_how_the_data_is_trained(run_data, tmp_path: Path) -> None:
    recipe = run_data.root / "recipe.yaml"
    code, page = inspect(tmp_path / "page.html", "--recipe", recipe, "--samples", 2, "--packs", 1, tokenizer=None)
    assert code == 0
    assert "192 tokens a pack" in page.text
    assert "picture 1: 4 slots" in page.text
    assert "pictures/train-" in page.text  # the recipe's name of the data set
    loaded = load_recipe(recipe, [], expand_presets)
    tokenizer = load_tokenizer(loaded.data.tokenizer)
    trained = next(PackReader(loaded.data.train, loaded.data, tokenizer, SquashPlan(16, 4), rank=0, world_size=1,
                              seed=loaded.training.seed, training=True))  # fmt: skip
    for key in trained.sample_keys:
        assert key in page.text
    assert f"{len(trained.images)} pictures, {trained.supervised_tokens:,} supervised" in page.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name the data sets to show, or a recipe with --recipe"),
        (("{root}/no",), "--tokenizer is missing; give a tokenizer file, or a recipe"),
        (
            ("{root}/no", "--tokenizer", "{tokenizer}"),
            "data set {root}/no does not exist",
        ),
        (("{root}", "--tokenizer", "{tokenizer}", "--packs", "-1"), "--packs must be at least 0, not -1"),
        (("{root}", "--tokenizer", "{tokenizer}", "--max-mb", "0"), "--max-mb must be at least 0.1, not 0"),
    ],
)
def test_wrong_input_is_one_line(
    tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    def fill(text: str) -> str:
        return text.format(root=tmp_path, tokenizer=tokenizer_path)

    assert cli.main(["inspect", *map(fill, words), "-o", str(tmp_path / "page.html")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"megavlm: error: {fill(message)}")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("write", [write_tiktoken, write_qwen2, write_llava, write_llama], ids=lambda f: f.__name__)
def test_every_kind_of_tokenizer_is_written_out(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    tokenizer = load_tokenizer(write(tmp_path))
    text = f"Where  is the caf\u00e9?\n{HAN}, \U0001f600 <ref>it</ref><box>(1,2),(3,4)</box>"
    conversation = parse_conversation(chat(f"<img>a.jpg</img>{text}", text))
    encoded = encode_conversation(conversation, tokenizer, [(3,)] * len(conversation.images), "You help.")
    pack = build_pack([PackableSample(encoded, (b"",), "k", 0)], len(encoded.tokens), tokenizer.eos_id)
    (part,) = segments(pack, tokenizer, SquashPlan(16, 3))
    assert [i for piece in part.pieces for i in piece.ids] == encoded.tokens.tolist()
    answer = "".join(piece.text for piece in part.pieces if piece.supervised)
    assert text in answer
    assert "\ufffd" not in "".join(piece.text for piece in part.pieces)
    assert [shape.points[0] for shape in part.shapes] == [(1, 2)] * 2
