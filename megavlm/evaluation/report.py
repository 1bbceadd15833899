"""A page of a benchmark's scores and some of its questions with pictures: one HTML file that needs no other."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megavlm.data.images import ImageError, decode_with_pil
from megavlm.evaluation.benchmarks.spec import Picture, picture_bytes
from megavlm.evaluation.panel import PanelItem, draw_pictures

_SIDE = 300
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1320px; padding: 0 1em; color: #23262f;
       background: #eef0f4 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse; background: #fff } th, td { padding: .3em .9em; border: 1px solid #d5d8de }
td.n { text-align: right; font-variant-numeric: tabular-nums } th { text-align: left }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 14px }
.card { background: #fff; border-top: 4px solid #c4242c; border-radius: 6px; padding: 10px; overflow-wrap: anywhere }
.card.right { border-color: #12803e } .card.part { border-color: #c58a00 }
.card img { width: 100%; display: block } .card p { margin: .5em 0 0 } pre { white-space: pre-wrap; margin: .5em 0 0;
       font: inherit; max-height: 14em; overflow: auto } .muted { color: #707682 }
"""


@dataclass(frozen=True)
class Card:
    """A question on the page."""

    title: str
    question: str
    expected: str
    predicted: str
    score: float | None
    """0 to 1; None where it is not known."""
    pictures: Sequence[Picture]
    note: str = ""


def write_report(
    path: Path,
    title: str,
    facts: Mapping[str, str],
    values: Mapping[str, float],
    kinds: Mapping[str, Mapping[str, float]],
    problems: Sequence[str],
    cards: Sequence[Card],
) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        title: heading.
        facts: what was run, shown as it is.
        values: figures of the whole benchmark.
        kinds: figures of its sub-tasks.
        problems: what went wrong, a line each.
        cards: questions to show.
    """
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        # Whatever a question or an answer holds, nothing on this page runs or is fetched.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">",
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body><h1>{_text(title)}</h1>",
        _table({name: (f"{value:.2f}",) for name, value in values.items()}, ("figure", "value")) if values else "",
    ]
    if kinds:
        names = list(next(iter(kinds.values())))
        rows = {kind: tuple(f"{found[name]:.2f}" for name in names) for kind, found in kinds.items()}
        parts.append("<h2>Sub-tasks</h2>" + _table(rows, ("sub-task", *names)))
    if problems:
        lines = "".join(f"<li>{_text(line)}</li>" for line in problems)
        parts.append(f"<h2>Problems</h2><ul>{lines}</ul>")
    if cards:
        parts.append(f'<h2>Questions</h2><div class="cards">{"".join(map(_card, cards))}</div>')
    parts.append("<h2>Run</h2>" + _table({name: (value,) for name, value in facts.items()}, ("", "")))
    path.write_text("\n".join(parts) + "</body></html>\n", encoding="utf-8")


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _table(rows: Mapping[str, Sequence[str]], head: Sequence[str]) -> str:
    top = "".join(f"<th>{_text(name)}</th>" for name in head)
    body = "".join(
        f"<tr><th>{_text(name)}</th>" + "".join(f'<td class="n">{_text(value)}</td>' for value in values) + "</tr>"
        for name, values in rows.items()
    )
    return f"<table>{f'<tr>{top}</tr>' if any(head) else ''}{body}</table>"


def _card(card: Card) -> str:
    kind = "" if card.score is None or card.score <= 0 else "right" if card.score >= 1 else "part"
    score = "" if card.score is None else f" &middot; {card.score:.2f}"
    note = f'<p class="muted">{_text(card.note)}</p>' if card.note else ""
    return (
        f'<div class="card {kind}">{_picture(card)}<p class="muted">{_text(card.title)}{score}</p>'
        f"<pre>{_text(card.question)}</pre><p>expected: {_text(card.expected)}</p>"
        f"<p>predicted: <b>{_text(card.predicted) or '(nothing)'}</b></p>{note}</div>"
    )


def _picture(card: Card) -> str:
    images = []
    for source in card.pictures:
        try:
            images.append(decode_with_pil(picture_bytes(source)))
        except (ImageError, OSError):
            return '<p class="muted">(broken picture)</p>'
    right = card.score is not None and card.score >= 1
    item = PanelItem(card.question, card.expected, card.predicted, images, correct=right)
    file = io.BytesIO()
    draw_pictures(item, _SIDE).save(file, "JPEG", quality=85)
    encoded = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{encoded}">'
