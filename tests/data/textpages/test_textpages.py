"""Pages of text: what the files say is what the pictures show, and the seed decides all."""

from __future__ import annotations

import json
import logging
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from megavlm import cli
from megavlm.data.textpages.draw import choose_colours, choose_distortion, distort, draw_page, map_box
from megavlm.data.textpages.fonts import find_fonts
from megavlm.data.textpages.layout import Style, join_lines, set_page, wrap

HAN = "\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u516c\u56ed\u3002"


def has_font(language: str) -> bool:
    try:
        return bool(find_fonts(language))
    except ValueError:
        return False


needs_fonts = pytest.mark.skipif(
    not (has_font("en") and has_font("zh")), reason="needs Debian's fonts-dejavu-core and fonts-wqy-zenhei, or the like"
)


def render(out: Path, *words: object) -> list[dict]:
    assert cli.main(["render-text", "--out", str(out), *map(str, words)]) == 0
    return [json.loads(line) for line in (out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@needs_fonts
def test_the_seed_decides_everything_and_the_processes_nothing(tmp_path: Path) -> None:
    render(tmp_path / "a", "--pages", 6, "--seed", 3)
    render(tmp_path / "b", "--pages", 6, "--seed", 3, "--workers", 2)
    render(tmp_path / "c", "--pages", 6, "--seed", 4)
    one, again, other = (files(tmp_path / name) for name in "abc")
    assert len(one) == 7
    assert one == again
    assert all(one[name] != other[name] for name in one)


@needs_fonts
def test_pages_flow_through_prepare(tmp_path: Path) -> None:
    pages = render(tmp_path / "pages", "--pages", 12, "--seed", 1)
    words = ["prepare", str(tmp_path / "pages/metadata.jsonl"), "--images", str(tmp_path / "pages")]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "rejected.jsonl").read_text() == ""
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        records = [json.loads(tar.extractfile(m).read()) for m in tar if m.name.endswith("json")]
    truths = [json.loads(page["ground_truth"]) for page in pages]
    assert {"ocr", "ocr with grounding"} == {record["task"] for record in records}
    for record, truth in zip(records, truths, strict=True):
        answer = record["conversations"][1]["value"]
        if record["task"] == "ocr":
            assert answer == truth["gt_parse"]["text_sequence"]
        else:
            assert [part.split("</ref>")[0] for part in answer.split("<ref>")[1:]] == [
                line["text"] for line in truth["lines"]
            ]
    # English and Chinese take turns.
    chinese = [any(char >= "\u4e00" for char in truth["gt_parse"]["text_sequence"]) for truth in truths]
    assert chinese == [False, True] * 6


def test_quads_hold_all_of_the_ink() -> None:
    """Distorted as pages are, every dark pixel lies in some line's quad, and every quad has some."""
    font, size = ImageFont.load_default(20), (400, 300)
    text = ["Gypsy jumps quickly over the (lazy) dog, again and again."]
    style = Style(columns=2, margin=20, gap=20, spacing=1.5, centred=False)
    lines = [
        line for part in set_page(text, "Heading", font, ImageFont.load_default(30), size, style) for line in part.lines
    ]
    assert len(lines) > 4
    turned = 0
    for seed in range(6):
        rng = random.Random(seed)
        matrix = choose_distortion(size, rng, 1.0)
        turned += not np.array_equal(matrix, np.eye(3))
        flat = Image.new("RGB", size, "white")
        for line in lines:
            ImageDraw.Draw(flat).text((line.x, line.y), line.text, fill="black", font=line.font, anchor="ls")
        dark = np.asarray(distort(flat, matrix, (255, 255, 255)).convert("L")) < 128
        inside = np.zeros_like(dark)
        for line in lines:
            quad = Image.new("L", size)
            ImageDraw.Draw(quad).polygon(map_box(matrix, line.box()), fill=1)
            assert (dark & (np.asarray(quad) > 0)).sum() > 20, line.text
            # A pixel is blurred over its neighbours when it is moved.
            inside |= np.asarray(quad.filter(ImageFilter.MaxFilter(5))) > 0
        assert dark.sum() > 500
        assert not (dark & ~inside).any()
    assert turned >= 3
    # And no more than it: the box of a line that lies flat is that of its ink.
    flat = Image.new("L", size)
    ImageDraw.Draw(flat).text((lines[1].x, lines[1].y), lines[1].text, fill=255, font=lines[1].font, anchor="ls")
    ink = flat.getbbox()
    assert ink is not None
    assert np.abs(np.array(ink) - lines[1].box()).max() <= 1


def test_ink_can_be_read_on_its_paper() -> None:
    rng = random.Random(0)
    font = ImageFont.load_default(24)
    style = Style(columns=1, margin=10, gap=10, spacing=1.5, centred=True)
    lines = [line for part in set_page(["Readable text"], None, font, font, (220, 80), style) for line in part.lines]
    for _ in range(20):
        paper, ink = choose_colours(rng)
        bare, written = (draw_page(shown, (220, 80), paper, ink, random.Random(1)) for shown in ([], lines))
        difference = np.abs(np.asarray(written, int) - np.asarray(bare, int)).max(axis=2)
        assert (difference > 60).sum() > 200


def test_lines_break_between_words_and_between_chinese_characters() -> None:
    font = ImageFont.load_default(20)
    text = "Several words in a row, and one incomprehensibilities."
    lines = wrap(text, font, 150)
    assert len(lines) > 3
    assert all(font.getlength(line) <= 150 for line in lines)
    assert join_lines(lines).startswith("Several words in a row, and one ")
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    width = font.getlength(HAN[:7])
    broken = wrap(HAN, font, width)
    assert join_lines(broken) == HAN
    assert all(line[0] not in "\uff0c\u3002" for line in broken)


@needs_fonts
def test_a_corpus_of_ones_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus = tmp_path / "corpus.txt"
    unknown = "\U000f0001"  # private use: no font has it
    corpus.write_text(f"{HAN * 3}\nMind  the{unknown} gap.\n\n<img>x.jpg</img>\n", encoding="utf-8")
    caplog.set_level(logging.INFO)
    pages = render(tmp_path / "pages", "--pages", 6, "--corpus", corpus, "--grounded", 0, "--distortion", 0)
    texts = [json.loads(page["ground_truth"])["gt_parse"]["text_sequence"] for page in pages]
    for english in texts[0::2]:
        assert set(english.split()) <= {"Mind", "the", "gap."}
    for chinese in texts[1::2]:
        assert set(chinese) <= set(HAN) | {"\n"}
    assert "1 lines left out, because they contain markup" in caplog.text
    assert f"characters that no font has were left out, such as {unknown!r}" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--fonts", "{empty}", "--language", "zh"),
         "no font in {empty} can write Chinese; apt install fonts-wqy-zenhei fonts-noto-cjk, or name a directory with"),
        (("--pages", "0"), "--pages must be at least 1, not 0"),
        (("--corpus", "{empty}/no.txt"), "corpus {empty}/no.txt does not exist"),
        (("--corpus", "{corpus}", "--language", "zh"), "corpus {corpus} has no lines with Chinese characters"),
        (("--out", "{full}"), "--out {full} is not an empty directory; choose another"),
        (("--fonts", "{empty}/no"), "font directory {empty}/no does not exist"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    empty, full, corpus = tmp_path / "empty", tmp_path / "full", tmp_path / "full" / "corpus.txt"
    empty.mkdir()
    full.mkdir()
    corpus.write_text("Only English.\n")

    def fill(text: str) -> str:
        return text.format(empty=empty, full=full, corpus=corpus)

    assert cli.main(["render-text", "--out", str(tmp_path / "out"), "--pages", "1", *map(fill, words)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"megavlm: error: {fill(message)}")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
