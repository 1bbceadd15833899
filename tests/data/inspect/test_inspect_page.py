"""The page shows what is trained, and nothing in the data can make it do anything."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from data_helpers import TOKENS_PER_IMAGE, encode_image, open_reader, prepare, write_raw
from PIL import Image
from tokenizer_files import write_llama, write_llava, write_qwen2, write_tiktoken

from megavlm import cli
from megavlm.data.batch import IGNORE_INDEX
from megavlm.data.chat import encode_conversation
from megavlm.data.inspect.tokens import segments, shapes
from megavlm.data.packing import PackableSample, build_pack
from megavlm.data.schema import parse_conversation
from megavlm.data.tokenizer import Tokenizer, load_tokenizer

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
        parts = segments(pack, tokenizer)
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
    (part, *_) = segments(next(open_reader([shards], tokenizer)), tokenizer)
    written = [piece for piece in part.pieces if piece.text in HAN]
    assert [(piece.text, len(piece.ids)) for piece in written] == [(char, 3) for char in HAN * 2]
    assert [piece.supervised for piece in written] == [False] * len(HAN) + [True] * len(HAN)


def test_shapes() -> None:
    text = "<ref>a cat</ref><box>(10,20),(30,40)</box>, <quad>(1,2),(3,4),(5,6),(7,8)</quad><box>(1,2)</box>"
    box, quad = shapes(text)
    assert (box.kind, box.name, box.points) == ("box", "a cat", ((10, 20), (30, 20), (30, 40), (10, 40)))
    assert (quad.kind, quad.name, quad.points) == ("quad", "", ((1, 2), (3, 4), (5, 6), (7, 8)))


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
    for text in ("too long", "bad image (not an image)", "(none)", "task box", "sample 3", "pack 2", "segment 2"):
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


def test_a_recipe_says_how_the_data_is_trained(run_data, tmp_path: Path) -> None:
    recipe = run_data.root / "recipe.yaml"
    code, page = inspect(tmp_path / "page.html", "--recipe", recipe, "--samples", 2, "--packs", 1, tokenizer=None)
    assert code == 0
    assert "192 tokens a pack" in page.text
    assert "picture 1: 4 slots" in page.text
    assert "pictures/train-" in page.text  # the recipe's name of the data set
    from megavlm.config.load import load_recipe
    from megavlm.data.reader import PackReader
    from megavlm.data.tokenizer import load_tokenizer
    from megavlm.models.registry import expand_presets

    loaded = load_recipe(recipe, [], expand_presets)
    tokenizer = load_tokenizer(loaded.data.tokenizer)
    trained = next(PackReader(loaded.data.train, loaded.data, tokenizer, 4, rank=0, world_size=1,
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
            "data set {root}/no is not prepared; make it with megavlm prepare",
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
    encoded = encode_conversation(conversation, tokenizer, 3, "You help.")
    pack = build_pack([PackableSample(encoded, (b"",), "k", 0)], len(encoded.tokens), tokenizer.eos_id)
    (part,) = segments(pack, tokenizer)
    assert [i for piece in part.pieces for i in piece.ids] == encoded.tokens.tolist()
    answer = "".join(piece.text for piece in part.pieces if piece.supervised)
    assert text in answer
    assert "\ufffd" not in "".join(piece.text for piece in part.pieces)
    assert [shape.points[0] for shape in part.shapes] == [(1, 2)] * 2
