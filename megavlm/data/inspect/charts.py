"""Histograms as inline SVG."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT, _BASE, _TOP = 520, 170, 140, 16


def length_histogram(series: Mapping[str, Sequence[int]], colours: Sequence[str], limit: int, bins: int = 32) -> str:
    """Draw the number of samples by tokens, stacked by data set, up to ``limit`` tokens (a pack).

    Args:
        series: Lengths by data set.
        colours: CSS colour of each data set.
        limit: Tokens of a pack.
        bins: Bars.
    """
    longest = max((max(lengths) for lengths in series.values() if lengths), default=1)
    width = max(1, -(-min(longest, limit) // bins))
    columns = [Counter(min(bins - 1, (length - 1) // width) for length in lengths) for lengths in series.values()]
    most = max((sum(column[b] for column in columns) for b in range(bins)), default=0) or 1
    step = _WIDTH / bins
    bars = []
    for b in range(bins):
        bottom = float(_BASE)
        for name, column, colour in zip(series, columns, colours, strict=False):
            if not column[b]:
                continue
            height = (_BASE - _TOP) * column[b] / most
            bottom -= height
            tip = f"{name}: {column[b]:,} samples of {b * width + 1} to {(b + 1) * width} tokens"
            bars.append(
                f'<rect x="{b * step:.1f}" y="{bottom:.1f}" width="{step - 1:.1f}" height="{height:.1f}" '
                f'fill="{escape(colour)}"><title>{escape(tip)}</title></rect>'
            )
    marks = [(0, "1", "start"), (_WIDTH / 2, f"{bins * width // 2:,}", "middle"), (_WIDTH, f"{bins * width:,}", "end")]
    labels = [f'<text x="{x:.0f}" y="{_BASE + 16}" text-anchor="{anchor}">{text}</text>' for x, text, anchor in marks]
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"><title>Samples by length</title>'
        f'<line x1="0" y1="{_BASE}" x2="{_WIDTH}" y2="{_BASE}" class="axis"/>{"".join(bars)}{"".join(labels)}'
        f'<text x="{_WIDTH}" y="12" text-anchor="end">highest bar: {most:,} samples</text></svg>'
    )


def bars(counts: Sequence[tuple[str, int]], colour: str, title: str, most_rows: int = 24) -> str:
    """Draw a row for each name; what is beyond ``most_rows`` is summed up in a last one."""
    rows = list(counts[:most_rows])
    rest = sum(number for _, number in counts[most_rows:])
    if rest:
        rows.append((f"{len(counts) - most_rows} others", rest))
    most = max((number for _, number in rows), default=0) or 1
    height, left = 18, 150
    parts = []
    for index, (name, number) in enumerate(rows):
        y = index * height
        width = max(1.0, (_WIDTH - left - 70) * number / most)
        short = name if len(name) <= 22 else f"{name[:21]}\u2026"
        parts.append(
            f'<text x="{left - 6}" y="{y + 13}" text-anchor="end">{escape(short)}<title>{escape(name)}</title></text>'
            f'<rect x="{left}" y="{y + 2}" width="{width:.1f}" height="{height - 4}" fill="{escape(colour)}"/>'
            f'<text x="{left + width + 6:.1f}" y="{y + 13}">{number:,}</text>'
        )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {max(1, len(rows)) * height}" role="img"><title>{escape(title)}</title>'
        f"{''.join(parts)}</svg>"
    )
