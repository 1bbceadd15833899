"""``megavlm render-text``: pages of text as pictures, with ``metadata.jsonl`` in SynthDoG's form beside them.

``megavlm prepare OUT/metadata.jsonl --images OUT --out SHARDS`` makes training data of them. A page depends on the
seed, its number, the corpus and the installed fonts (and on Pillow's version), not on the pages before it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.config.errors import MissingFileError, UserError
from megavlm.data.publish import new_directory
from megavlm.data.textpages.corpus import LANGUAGES, Corpus, read_corpus
from megavlm.data.textpages.draw import choose_colours, choose_distortion, distort, draw_page, map_box, spoil
from megavlm.data.textpages.fonts import FONT_DIRECTORIES, Face, find_fonts
from megavlm.data.textpages.layout import choose_style, set_page
from megavlm.parallel.processes import end_with_parent

logger = logging.getLogger(__name__)

METADATA = "metadata.jsonl"
_PER_FOLDER = 1000
_SMALLEST = 160
_TELL_EVERY = 30.0
"""Seconds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--out", type=Path, required=True, help="directory to write; must not exist, or be empty")
    parser.add_argument("--pages", type=int, required=True, metavar="N", help="pages to render")
    parser.add_argument(
        "--language", nargs="+", choices=LANGUAGES, default=list(LANGUAGES), help="en, zh, or both in turn (default)"
    )
    parser.add_argument(
        "--corpus", type=Path, metavar="FILE", help="UTF-8 text, a paragraph in each line (default: made-up sentences)"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other pages (default 0)")
    parser.add_argument(
        "--grounded", type=float, default=0.5, metavar="SHARE",
        help="share of the pages whose lines come with their places (default 0.5)",
    )  # fmt: skip
    parser.add_argument("--size", type=int, default=560, metavar="N", help="shorter side, pixels (default 560)")
    parser.add_argument(
        "--distortion", type=float, default=1.0, metavar="F",
        help="turning, perspective, blur and noise: 0 for none, 1 for what a scan has (default), at most 3",
    )  # fmt: skip
    parser.add_argument(
        "--fonts", type=Path, nargs="+", metavar="DIR", help="directories to look for fonts in (default: Debian's)"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default 1)")


@dataclass(frozen=True)
class _PageSettings:
    """What all pages share."""

    corpora: tuple[Corpus, ...]
    faces: dict[str, tuple[Face, ...]]
    seed: int
    grounded: float
    size: int
    distortion: float
    out: Path


_Rendered = tuple[dict[str, Any], Counter[str]]
"""A page's line of the metadata, and the characters that were left out."""
_PLANS: list[_PageSettings] = []
"""In a worker process: its plan."""


def run(args: argparse.Namespace) -> int:
    """Render the pages.

    Returns:
        0.

    Raises:
        MissingFileError: The corpus or a font directory is missing.
        UserError: An argument is wrong, the output is not empty, or no font can write a language.
    """
    _check_arguments(args)
    languages = tuple(dict.fromkeys(args.language))
    corpora = tuple(read_corpus(args.corpus, languages))
    faces = {language: tuple(find_fonts(language, args.fonts or FONT_DIRECTORIES)) for language in languages}
    with new_directory(args.out, "render-text", replace=False) as partial:
        plan = _PageSettings(corpora, faces, args.seed, args.grounded, args.size, args.distortion, partial)
        dropped = _render_all(plan, args.pages, args.workers)
    if dropped:
        shown = " ".join(repr(char) for char, _ in dropped.most_common(8))
        logger.warning("%d characters that no font has were left out, such as %s", dropped.total(), shown)
    counts = ", ".join(f"{len(found)} fonts for {language}" for language, found in faces.items())
    logger.info("%s: %d pages (%s); next: megavlm prepare %s --images %s", args.out, args.pages, counts,
                args.out / METADATA, args.out)  # fmt: skip
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    for name, least in (("pages", 1), ("workers", 1), ("size", _SMALLEST), ("seed", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} must be at least {least}, not {getattr(args, name)}")
    if not 0 <= args.grounded <= 1:
        raise UserError(f"--grounded must be from 0 to 1, not {args.grounded:g}")
    if not 0 <= args.distortion <= 3:
        raise UserError(f"--distortion must be from 0 to 3, not {args.distortion:g}")
    for directory in args.fonts or ():
        if not directory.is_dir():
            raise MissingFileError(f"font directory {directory} does not exist")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"--out {args.out} is not an empty directory; choose another")


def _render_all(plan: _PageSettings, pages: int, workers: int) -> Counter[str]:
    """Write all pages and the metadata; return the characters that no font has."""
    dropped: Counter[str] = Counter()
    with (plan.out / METADATA).open("w", encoding="utf-8") as metadata, _results(plan, pages, workers) as results:
        told = time.monotonic()
        for number, (line, missing) in enumerate(results, 1):
            metadata.write(json.dumps(line, ensure_ascii=False) + "\n")
            dropped += missing
            if time.monotonic() - told > _TELL_EVERY:
                logger.info("%d of %d pages", number, pages)
                told = time.monotonic()
    return dropped


@contextmanager
def _results(plan: _PageSettings, pages: int, workers: int) -> Iterator[Iterator[_Rendered]]:
    """Give the results of all pages in order, rendered by so many processes."""
    if workers == 1:
        yield (render_page(plan, index) for index in range(pages))
        return
    # Each process has the plan once, and remembers what its fonts can draw.
    pool = ProcessPoolExecutor(workers, initializer=_begin, initargs=(os.getpid(), plan))
    try:
        yield pool.map(_render_in_worker, range(pages), chunksize=16)
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(parent: int, plan: _PageSettings) -> None:
    """Prepare a worker process."""
    end_with_parent(parent)
    _PLANS.append(plan)


def _render_in_worker(index: int) -> _Rendered:
    return render_page(_PLANS[-1], index)


def render_page(plan: _PageSettings, index: int) -> _Rendered:
    """Write one page's picture.

    Returns:
        Its line of the metadata, and the characters that were left out.
    """
    rng = random.Random(f"{plan.seed}/{index}")
    corpus = plan.corpora[index % len(plan.corpora)]
    width, height = plan.size, round(plan.size * rng.uniform(1.0, 1.5))
    size = (height, width) if rng.random() < 0.3 else (width, height)
    # At 448 pixels, to which the model sees it reduced, letters are 12 to 32 pixels high.
    font_size = round(plan.size / 448 * rng.choice((12, 14, 16, 18, 20, 24, 28, 32)) * (max(size) / plan.size))
    fits = size[0] * size[1] / font_size**2 * (0.65 if corpus.language == "zh" else 1.3)
    paragraphs = corpus.draw(rng, max(8, round(fits * rng.uniform(0.15, 0.9))))
    heading = next(iter(corpus.draw(rng, 18)), None) if rng.random() < 0.35 else None
    face, missing = _choose_face(plan.faces[corpus.language], "".join([*paragraphs, heading or ""]), rng)
    if missing:
        remove = str.maketrans("", "", "".join(missing))
        paragraphs = [text for text in (text.translate(remove).strip() for text in paragraphs) if text]
        heading = heading.translate(remove).strip() if heading else None
    style = choose_style(rng, size[0], font_size)
    large = face.at(round(1.5 * font_size))
    placed = set_page(paragraphs, heading, face.at(font_size), large, size, style)
    lines = [line for paragraph in placed for line in paragraph.lines]
    paper, ink = choose_colours(rng)
    matrix = choose_distortion(size, rng, plan.distortion)
    image = draw_page(lines, size, paper, ink, rng)
    ground = (paper[0] * 3 // 4, paper[1] * 3 // 4, paper[2] * 3 // 4)
    image = spoil(distort(image, matrix, ground), rng, plan.distortion)
    name = f"{index // _PER_FOLDER:04d}/{index:07d}.jpg"
    path = plan.out / name
    path.parent.mkdir(exist_ok=True)
    image.save(path, "JPEG", quality=rng.randint(70, 95))
    truth: dict[str, Any] = {"gt_parse": {"text_sequence": "\n".join(paragraph.text for paragraph in placed)}}
    if rng.random() < plan.grounded:
        truth["size"] = list(size)
        quads = [[[round(x, 1), round(y, 1)] for x, y in map_box(matrix, line.box())] for line in lines]
        truth["lines"] = [{"text": line.text, "quad": quad} for line, quad in zip(lines, quads, strict=True)]
    return {"file_name": name, "ground_truth": json.dumps(truth, ensure_ascii=False)}, missing


def _choose_face(faces: tuple[Face, ...], text: str, rng: random.Random) -> tuple[Face, Counter[str]]:
    """Draw a font that has all of the text; where none has, the first drawn, with what it lacks."""
    order = rng.sample(faces, len(faces))
    for face in order:
        if not face.missing(text):
            return face, Counter()
    lacking = order[0].missing(text)
    return order[0], Counter(char for char in text if char in lacking)
