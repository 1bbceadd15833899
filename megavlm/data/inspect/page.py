"""The page itself: one file of HTML without scripts, whose every text is escaped and whose pictures are in it.

Texts and pictures of a data set are written by others. Everything goes through :func:`html.escape`, and a content
security policy forbids scripts and loading anything, should that ever be forgotten.
"""

from __future__ import annotations

import base64
import contextlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from megavlm.config.errors import UserError
from megavlm.data.batch import Pack
from megavlm.data.films.film import Film
from megavlm.data.films.plan import FilmLayout
from megavlm.data.image_colours import Alpha
from megavlm.data.images import ImageError, decode_with_pil
from megavlm.data.inspect.charts import bars, length_histogram
from megavlm.data.inspect.collect import Collected, Counts
from megavlm.data.inspect.planes import LOOK, SWITCH, planes
from megavlm.data.inspect.strip import filmstrip
from megavlm.data.inspect.tokens import Segment, Shape, ShownTokens, segments
from megavlm.data.media import ImageLayout, ImagePlan, layouts_of, pixels_of
from megavlm.data.tokenizer import Tokenizer

_THUMBNAIL = 280
_SMALL = 160
"""Smaller pictures are enlarged to about this many pixels."""
_COLOURS = ("#3b6fb6", "#c46a1f", "#3f8f57", "#9557a8", "#a8434b", "#5f7d85", "#8a7a24", "#7a5a44")
_PADDING_COLOUR = "#d5d8de"
_STYLE = Path(__file__).with_name("page.css")
_MOST_NAMES = 8
"""With more boxes, names are shown only under the pointer; so are those of lines of text, which they would hide."""
_RESERVED = 4096
"""Bytes kept for the note on what was left out, and the end of the page."""


def write_page(found: Collected, tokenizer: Tokenizer, limit: int) -> bytes:
    """Return the page, UTF-8.

    Args:
        found: What to show.
        tokenizer: The tokenizer, to write the tokens out.
        limit: Largest page in bytes; what does not fit is left out, and the page says so.

    Raises:
        UserError: Not even the figures fit.
    """
    head = _head(found)
    end = "</main></body></html>\n"
    used = len(head.encode()) + len(end) + _RESERVED
    if used > limit:
        raise UserError(f"--max-mb: the figures alone take {used:,} bytes; raise it to {used / 1e6 + 0.1:.1f}")
    parts = [head]
    samples = (_sample(number, shown.pack, shown.task, found, tokenizer) for number, shown in enumerate(found.samples))
    packs = (_pack(number, pack, found, tokenizer) for number, pack in enumerate(found.packs))
    # Packs get what samples leave, but samples at most two thirds where there are packs.
    share = used + (limit - used) * 2 // 3 if found.packs else limit
    for title, blocks, count, most in (
        ("Samples", samples, len(found.samples), share),
        ("Packs", packs, len(found.packs), limit),
    ):
        if not count:
            continue
        parts.append(f"<h2>{title}</h2>")
        shown_blocks, used = _fit(blocks, used, most)
        parts += ['<div class="blocks">', *shown_blocks, "</div>"]
        if len(shown_blocks) < count:
            parts.append(
                f'<p class="note">{len(shown_blocks)} of {count} are shown: a page may have {limit / 1e6:g} MB'
                " (--max-mb).</p>"
            )
    return "".join([*parts, end]).encode()


def _fit(blocks: Iterable[str], used: int, most: int) -> tuple[list[str], int]:
    taken = []
    for block in blocks:
        size = len(block.encode())
        if used + size > most:
            break
        used += size
        taken.append(block)
    return taken, used


def _picture_facts(found: Collected) -> str:
    """How many tokens pictures have: one number, or from the samples on the page."""
    shapes = [shape for pack in (*(one.pack for one in found.samples), *found.packs) for shape in pack.image_shapes]
    if layouts_of(found.plan, shapes) is None:
        return f"{found.plan.tokens_per_view} tokens a picture (and two around it)"
    if not shapes:
        if found.plan.packed:
            return "tokens by the size of each picture"
        return f"{found.plan.tokens_per_view} tokens a view of a picture"
    layouts = [found.plan.of(shape) for shape in shapes]
    kinds = (
        ("picture", [one for one in layouts if not isinstance(one, FilmLayout)]),
        ("film", [one for one in layouts if isinstance(one, FilmLayout)]),
    )
    return "; ".join(_sizes(found.plan, what, own) for what, own in kinds if own)


def _sizes(plan: ImagePlan, what: str, layouts: Sequence[ImageLayout]) -> str:
    tokens = [one.tokens for one in layouts]
    told = f"{min(tokens)} to {max(tokens)} tokens a {what} ({sum(tokens) / len(tokens):.0f} on average), "
    if plan.packed:
        patches = [pixels_of(plan, one)[0] for one in layouts]
        return f"{told}{min(patches)} to {max(patches)} patches"
    views = [len(one.views) for one in layouts]
    return f"{told}{min(views)} to {max(views)} views"


def _head(found: Collected) -> str:
    data = found.data
    colours = _colours(found)
    tasks = sum((counts.tasks for counts in found.counts), Counter[str]())
    images = sum((counts.images for counts in found.counts), Counter[int]())
    films = sum((counts.films for counts in found.counts), Counter[int]())
    skipped = sum((counts.skipped for counts in found.counts), Counter[str]())
    lengths = {counts.name: counts.lengths for counts in found.counts}
    fill = _fill(found.packs)
    facts = [
        f"{data.sequence_length:,} tokens a pack",
        _picture_facts(found),
        f"packing {data.packing}",
        f"tokenizer {data.tokenizer}",
        *([f"system message \u201c{data.system_message}\u201d"] if data.system_message else []),
        *([f"{len(found.packs)} packs filled to {fill:.1%}"] if found.packs else []),
    ]
    charts = [
        ("Samples by length (tokens)", length_histogram(lengths, colours, data.sequence_length)),
        ("Samples by number of pictures", bars([(str(n), images[n]) for n in sorted(images)], _COLOURS[0], "pictures")),
        *(
            [("Samples by number of films", bars([(str(n), films[n]) for n in sorted(films)], _COLOURS[3], "films"))]
            if films.keys() - {0}
            else []
        ),
        ("Samples by task", bars(tasks.most_common(), _COLOURS[2], "tasks")),
    ]
    if skipped:
        charts.append(("Samples that training leaves out", bars(skipped.most_common(), _COLOURS[4], "skipped")))
    rows = "".join(_row(counts, colour) for counts, colour in zip(found.counts, colours, strict=True))
    figures = "".join(f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" for title, svg in charts)
    named = [f"{key}: {cause}" for counts in found.counts for key, cause in counts.named]
    left_out = f"<details><summary>Which are left out</summary><p>{'<br>'.join(map(escape, named))}</p></details>"
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>megavlm inspect</title>'
        f"<style>{LOOK}{_STYLE.read_text(encoding='utf-8')}</style></head><body><main>{SWITCH}"
        f'<h1>megavlm inspect</h1><p class="facts">{_joined(facts)}</p>'
        '<div class="wide"><table><thead><tr><th>data set</th><th>samples</th><th>counted</th><th>left out</th>'
        "<th>tokens: mean</th><th>longest</th><th>pictures</th><th>supervised</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
        f'<div class="charts">{figures}</div>{left_out if named else ""}'
        '<p class="legend"><span class="t s">supervised</span> the loss counts this token '
        '<span class="t m">masked</span> it does not <span class="t i">256 slots</span> a picture\u2019s features</p>'
    )


def _joined(facts: Sequence[str]) -> str:
    return " \u00b7 ".join(map(escape, facts))


def _row(counts: Counts, colour: str) -> str:
    usable, tokens = len(counts.lengths), sum(counts.lengths)
    pictures = sum(number * samples for number, samples in counts.images.items())
    films = sum(number * samples for number, samples in counts.films.items())
    moving = f", {films / usable:.2f} films" if films else ""
    cells = [
        f"{counts.total:,}",
        f"{counts.scanned:,}",
        f"{counts.skipped.total():,}",
        f"{tokens / usable:,.1f}" if usable else "-",
        f"{max(counts.lengths, default=0):,}",
        f"{pictures / usable:.2f} a sample{moving}" if usable else "-",
        f"{counts.supervised / tokens:.1%}" if tokens else "-",
    ]
    name = f'<i class="dot" style="background:{colour}"></i>{escape(counts.name)}'
    return f'<tr><td title="{escape(counts.path)}">{name}</td>{"".join(f"<td>{escape(c)}</td>" for c in cells)}</tr>'


def _colours(found: Collected) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(len(found.names))]


def _fill(packs: Sequence[Pack]) -> float:
    total = sum(len(pack.tokens) for pack in packs)
    return 1 - sum(pack.padding_tokens for pack in packs) / total if total else 0.0


def _sample(number: int, pack: Pack, task: str, found: Collected, tokenizer: Tokenizer) -> str:
    (segment,) = segments(pack, tokenizer, found.plan, found.space)
    title = f"sample {number + 1}"
    return f'<article id="sample-{number + 1}">{_body(segment, found, title, f"task {task}")}</article>'


def _pack(number: int, pack: Pack, found: Collected, tokenizer: Tokenizer) -> str:
    parts = segments(pack, tokenizer, found.plan, found.space)
    length = len(pack.tokens)
    filled = length - pack.padding_tokens
    blocks = []
    for index, segment in enumerate(parts, 1):
        colour = _PADDING_COLOUR if segment.source < 0 else _colours(found)[segment.source]
        share = 100 * (segment.end - segment.start) / length
        what = "padding" if segment.source < 0 else f"segment {index}: {segment.key}"
        tip = f"{what}, {segment.end - segment.start} tokens from {segment.start}, {len(segment.images)} pictures"
        blocks.append(f'<i style="width:{share:.3f}%;background:{colour}" title="{escape(tip)}"></i>')
    bodies = "".join(
        f'<section class="segment">{_body(segment, found, f"segment {index}")}</section>'
        for index, segment in enumerate(parts, 1)
    )
    facts = (
        f"{filled:,} of {length:,} tokens ({filled / length:.1%}) in {sum(s.source >= 0 for s in parts)} segments, "
        f"{len(pack.images)} pictures, {pack.supervised_tokens:,} supervised"
    )
    return (
        f'<article id="pack-{number + 1}"><h3>pack {number + 1}</h3><p class="facts">{escape(facts)}</p>'
        f'<div class="bar">{"".join(blocks)}</div>{bodies}</article>'
    )


def _body(segment: Segment, found: Collected, title: str, more: str = "") -> str:
    length = segment.end - segment.start
    if segment.source < 0:
        return f'<h4>{escape(title)}</h4><p class="facts">{length:,} tokens of padding, none supervised</p>'
    facts = [
        segment.key,
        *([more] if more else []),
        f"{length:,} tokens, {segment.start:,} to {segment.end - 1:,}",
        f"{segment.supervised:,} supervised",
    ]
    names = _names(segment.images)
    first = next((index for index, data in enumerate(segment.images) if isinstance(data, bytes)), None)
    images = "".join(
        _picture(data, found.data.image_alpha, names[index], segment.shapes if index == first else ())
        if isinstance(data, bytes)
        else filmstrip(data, segment.layouts[index], found.data.image_alpha, names[index])
        for index, data in enumerate(segment.images)
    )
    if images:
        images = f'<div class="pictures">{images}{_as_seen(segment, found)}</div>'
    note = ""
    if segment.key in found.masked:
        note = f'<p class="note">Nothing of it is trained on: {escape(found.masked[segment.key])}.</p>'
    if segment.shapes and sum(isinstance(data, bytes) for data in segment.images) > 1:
        note += '<p class="note">Boxes are drawn on the first picture; the text does not say on which they are.</p>'
    tokens = "".join(_token(piece, names) for piece in segment.pieces)
    return (
        f"<h4>{escape(title)}</h4>"
        f'<p class="facts"><i class="dot" style="background:{_colours(found)[segment.source]}"></i>'
        f"{_joined(facts)}</p>{note}"
        f'<div class="row">{images}<div class="text">{tokens}</div></div>'
    )


def _names(images: Sequence[bytes | Film]) -> list[str]:
    """Return what pictures and films are called: each kind is counted by itself."""
    found: list[str] = []
    for data in images:
        what = "picture" if isinstance(data, bytes) else "film"
        found.append(f"{what} {1 + sum(name.startswith(what) for name in found)}")
    return found


def _as_seen(segment: Segment, found: Collected) -> str:
    """Return a segment's pictures as the model sees them; those that cannot be decoded are told of beside it."""
    shown = ""
    for index, data in enumerate(segment.images):
        with contextlib.suppress(ImageError):
            if isinstance(data, bytes):
                images = segment.layouts[index].shape.images if segment.layouts else 1
                shown += planes(decode_with_pil(data, found.data.image_alpha), found.plan, images)
    return f'<details open class="model"><summary>as the model sees it</summary>{shown}</details>' if shown else ""


def _token(piece: ShownTokens, names: Sequence[str]) -> str:
    if piece.image is not None:
        wrong = " s" if piece.supervised else ""
        return f'<span class="t i{wrong}">{names[piece.image]}: {escape(piece.text)}</span>'
    text = escape(piece.text).replace("\n", "\u21b5\n")
    ids = ", ".join(map(str, piece.ids))
    ids += f"; weight {piece.weight:g}" if piece.supervised and piece.weight != 1 else ""
    return f'<span class="t {"s" if piece.supervised else "m"}" title="{ids}">{text}</span>'


def _picture(data: bytes, alpha: Alpha, name: str, drawn: Sequence[Shape]) -> str:
    try:
        image = decode_with_pil(data, alpha)
    except ImageError as error:
        return f'<div class="picture broken">{name}: {escape(str(error))}</div>'
    size = f"{image.width} x {image.height}"
    return f'<div class="picture">{_img(image, name, _THUMBNAIL, _SMALL, drawn)}<span>{name}, {size}</span></div>'


def _img(image: Image.Image, name: str, most: int, small: int, drawn: Sequence[Shape]) -> str:
    image.thumbnail((most, most))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    zoom = max(1, small // max(image.size))
    width, height = image.width * zoom, image.height * zoom
    url = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    marks = "".join(_marks(drawn))
    return f'<div class="frame"><img src="{url}" width="{width}" height="{height}" alt="{escape(name)}">{marks}</div>'


def _marks(drawn: Sequence[Shape]) -> Iterator[str]:
    """Outlines over the picture, stretched with it, and their names beside the first corner."""
    if not drawn:
        return
    yield '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none">'
    for number, shape in enumerate(drawn):
        points = " ".join(f"{x},{y}" for x, y in shape.points)
        yield (
            f'<polygon points="{points}" class="rim"/><polygon points="{points}" '
            f'stroke="{_COLOURS[number % len(_COLOURS)]}"><title>{escape(shape.name)}</title></polygon>'
        )
    yield "</svg>"
    named = [(number, shape) for number, shape in enumerate(drawn) if shape.name and shape.kind == "box"]
    for number, shape in named if len(named) <= _MOST_NAMES else ():
        (left, top), (right, _), *_ = shape.points
        name = shape.name if len(shape.name) <= 24 else f"{shape.name[:23]}\u2026"
        # Names grow inwards: to the right in the left half of the picture, to the left in the other.
        side = f"left:{left / 10:g}%" if left + right < 1000 else f"right:{100 - right / 10:g}%"
        yield f'<b style="{side};top:{top / 10:g}%;background:{_COLOURS[number % len(_COLOURS)]}">{escape(name)}</b>'
