"""A page of a benchmark's scores and some of its questions with pictures: one HTML file that needs no other."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from megavlm.config.errors import UserError
from megavlm.data.box_notations import find_boxes
from megavlm.data.box_space import ReadBoxes
from megavlm.data.image_colours import Alpha
from megavlm.data.images import decode_with_pil
from megavlm.data.inspect.planes import LOOK, SWITCH, planes
from megavlm.data.inspect.strip import filmstrip
from megavlm.data.machine import is_machine_fault
from megavlm.data.media import ImagePlan
from megavlm.evaluation.benchmarks.spec import Shown, StoredFilm, picture_bytes
from megavlm.evaluation.panel import PanelItem, draw_pictures

_SIDE = 300
_STYLE = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
_KINDS = {"wrong": "wrong", "part": "partly right", "right": "right", "open": "not scored"}


@dataclass(frozen=True)
class Card:
    """A question on the page."""

    title: str
    question: str
    expected: str
    predicted: str
    score: float | None
    """0 to 1; None where it is not known."""
    pictures: Sequence[Shown]
    note: str = ""
    boxes: ReadBoxes = find_boxes
    """Finds boxes in both answers, as parts of the first picture."""

    @property
    def kind(self) -> str:
        """``wrong``, ``part``, ``right``, or ``open`` where the score is not known."""
        if self.score is None:
            return "open"
        return "wrong" if self.score <= 0 else "right" if self.score >= 1 else "part"


@dataclass(frozen=True)
class Page:
    """What the page shows."""

    title: str
    facts: Mapping[str, str]
    """What was run, shown as it is."""
    values: Mapping[str, float]
    """Figures of the whole benchmark; the first is its headline."""
    kinds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Figures of its sub-tasks."""
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What others published: figure, model, value."""
    problems: Sequence[str] = ()
    """What went wrong, a line each."""
    cards: Sequence[Card] = ()
    """Questions to show."""
    plan: ImagePlan | None = None
    """What becomes of pictures, to show them as the model sees them."""
    alpha: Alpha = "white"
    """What becomes of their transparency."""


def write_report(path: Path, page: Page) -> None:
    """Write the page."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # Whatever a question or an answer holds, nothing on this page runs or is fetched.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">",
        f"<title>{_text(page.title)}</title><style>{LOOK}{_STYLE}</style></head><body>{SWITCH}",
        f'<h1>{_text(page.title)}</h1><div class="two"><div class="figures">',
        _figures(page),
        _published(page),
        _kinds(page),
    ]
    if page.problems:
        lines = "".join(f"<li>{_text(line)}</li>" for line in page.problems)
        parts.append(f"<h2>Problems</h2><ul>{lines}</ul>")
    facts = _table([[name, _text(value)] for name, value in page.facts.items()], ("", ""))
    parts.append(f"<details{'' if page.cards else ' open'}><summary>Run</summary>{facts}</details></div>")
    if page.cards:
        parts.append(f"<div>{_questions(page)}</div>")
    parts.append("</div>")
    path.write_text("\n".join(parts) + "</body></html>\n", encoding="utf-8")


def _figures(page: Page) -> str:
    rows = [[name.replace("_", " "), f"{value:.2f}"] for name, value in page.values.items()]
    return f"<section><h2>Scores</h2>{_table(rows, ('figure', 'value'))}</section>" if rows else ""


def _published(page: Page) -> str:
    """Bars of this run and of what others published, for each figure that they did."""
    parts = []
    for name, others in page.published.items():
        if name in page.values:
            both = {"this run": page.values[name], **others}
            most = max(100.0, *both.values())
            rows = [
                [model, f"{value:.2f}", _bar(value, most, own=model == "this run")] for model, value in both.items()
            ]
            parts.append(_table(rows, (name.replace("_", " "), "", "")))
    if not parts:
        return ""
    note = (
        "As their papers and model cards have them; many are of test parts whose answers are secret (VQAv2: test-dev), "
        "and of chat models."
    )
    return f'<section><h2>Beside published figures</h2>{"".join(parts)}<p class="muted">{note}</p></section>'


def _kinds(page: Page) -> str:
    if not page.kinds:
        return ""
    names = list(next(iter(page.kinds.values())))
    most = max(100.0, *(found[names[0]] for found in page.kinds.values()))
    rows = [
        [kind, *(f"{found[name]:.{0 if name in _COUNTS else 2}f}" for name in names), _bar(found[names[0]], most)]
        for kind, found in page.kinds.items()
    ]
    return "<h2>Sub-tasks</h2>" + _table(rows, ("sub-task", *(name.replace("_", " ") for name in names), ""))


_COUNTS = ("questions", "pictures")


def _bar(value: float, most: float, *, own: bool = True) -> str:
    share = 100 * max(0.0, value) / most
    return f'<div class="bar{"" if own else " other"}"><i style="width:{share:.1f}%"></i></div>'


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    """A table; the first cell of a row is text, the others are HTML."""
    top = "".join(f"<th>{_text(name)}</th>" for name in head)
    body = "".join(
        f"<tr><th>{_text(row[0])}</th>" + "".join(f'<td class="n">{cell}</td>' for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f"<table>{f'<tr>{top}</tr>' if any(head) else ''}{body}</table>"


def _questions(page: Page) -> str:
    """The cards under buttons that choose among them and sort them; the style sheet does both, no script runs."""
    cards = page.cards
    counts = {kind: sum(card.kind == kind for card in cards) for kind in _KINDS}
    inputs = '<input type="radio" name="show" id="show-all" checked>'
    labels = f'<label for="show-all">all ({len(cards)})</label>'
    for kind, count in counts.items():
        if count:
            inputs += f'<input type="radio" name="show" id="show-{kind}">'
            labels += f'<label for="show-{kind}" class="{kind}">{_KINDS[kind]} ({count})</label>'
    if len(cards) > 1 and len({card.score for card in cards}) > 1:
        inputs += '<input type="checkbox" id="worst">'
        labels += '<label for="worst" class="sort">worst first</label>'
    key = ""
    if any(card.boxes(text) for card in cards for text in (card.predicted, card.expected)):
        key = '<p class="muted">Boxes: predicted is solid, green if right and red if wrong; expected is dashed.</p>'
    scores = sorted({card.score for card in cards if card.score is not None})
    shown = "".join(
        _card(card, page, len(scores) if card.score is None else scores.index(card.score)) for card in cards
    )
    return f'<h2>Questions</h2>{inputs}<nav>{labels}</nav>{key}<div class="cards">{shown}</div>'


def _card(card: Card, page: Page, rank: int) -> str:
    """A card; ``rank`` is its place among the scores, from the worst."""
    score = "" if card.score is None else f" &middot; {card.score:.2f}"
    note = f'<p class="muted">{_text(card.note)}</p>' if card.note else ""
    return (
        f'<div class="card {card.kind}" style="--rank:{rank}">{_pictures(card, page)}'
        f'<p class="muted">{_text(card.title)}{score}</p>'
        f"<pre>{_text(card.question)}</pre><dl><dt>expected</dt><dd>{_text(card.expected) or '(secret)'}</dd>"
        f"<dt>predicted</dt><dd><b>{_text(card.predicted) or '(nothing)'}</b></dd></dl>{note}</div>"
    )


def _pictures(card: Card, page: Page) -> str:
    """The card's pictures with boxes, and as the model sees them; of its films some frames."""
    images: list[Image.Image] = []
    strips: list[str] = []
    for source in card.pictures:
        moving = isinstance(source, StoredFilm)
        try:
            if isinstance(source, StoredFilm):
                strips.append(_strip(source, page, len(card.pictures), len(strips) + 1))
            else:
                images.append(decode_with_pil(picture_bytes(source), page.alpha))
        except (UserError, OSError) as error:
            if is_machine_fault(error):
                raise
            return f'<p class="muted">(broken {"film" if moving else "picture"})</p>'
    return ("" if strips and not images else _images(card, page, images)) + "".join(strips)


def _strip(source: StoredFilm, page: Page, shown: int, number: int) -> str:
    """Return some of a film's frames, as far as the model is shown any.

    Raises:
        FilmError: it is no film that can be read, or shown.
    """
    if page.plan is None or page.plan.films is None:
        return '<p class="muted">(a film, which the model does not read)</p>'
    film = source.read()
    return filmstrip(film, page.plan.of(film.shape(shown)), page.alpha, f"film {number}")


def _images(card: Card, page: Page, images: Sequence[Image.Image]) -> str:
    right = card.score is not None and card.score >= 1
    item = PanelItem(card.question, card.expected, card.predicted, images, right, card.boxes)
    file = io.BytesIO()
    square = draw_pictures(item, _SIDE)
    if len(images) == 1:  # without the bars beside it
        across, down = (max(1, _SIDE * length // max(images[0].size)) for length in images[0].size)
        left, top = (_SIDE - across) // 2, (_SIDE - down) // 2
        square = square.crop((left, top, left + across, top + down))
    square.save(file, "JPEG", quality=85)
    encoded = base64.b64encode(file.getvalue()).decode()
    whole = f'<img alt="" src="data:image/jpeg;base64,{encoded}">'
    if page.plan is None or not images:
        return whole
    shown = "".join(planes(image, page.plan, len(card.pictures)) for image in images)
    return f"{whole}<details><summary>as the model sees it</summary>{shown}</details>"
