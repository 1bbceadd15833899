"""The table that the quickstart shows at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def _number(value: float) -> str:
    return f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _rate(value: float) -> str:
    return f"{value:,.0f}"


def _seconds(value: float) -> str:
    if round(value, 1) < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s"


def _layout(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {size}" for name, size in value.items())
    return str(value)


_ROWS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("layout", "layout", _layout),
    ("loss_first", "loss at the start", _number),
    ("loss_last", "loss at the end", _number),
    ("heldout_accuracy", "held-out accuracy (closed questions)", _percent),
    ("chance_accuracy", "  by chance it were", _percent),
    ("box_iou50", "boxes with IoU >= 0.5", _percent),
    ("useful_tokens_per_second", "useful tokens per second", _rate),
    ("padding_fraction", "padding", _percent),
    ("seconds_training", "time in training", _seconds),
    ("seconds_total", "time in all", _seconds),
)


def format_table(result: Mapping[str, Any]) -> str:
    """The quickstart's result as text, one row per figure, then one per held-out task.

    Of the keys ``layout``, ``loss_first``, ``loss_last``, ``heldout_accuracy``,
    ``chance_accuracy``, ``box_iou50``, ``useful_tokens_per_second``, ``padding_fraction``,
    ``seconds_training`` and ``seconds_total`` missing ones are left out and ``None`` is a dash.
    ``accuracy`` and ``counts`` are per task, as ``megavlm.evaluation.metrics.score`` returns them.
    """
    rows = [(label, "-" if result[key] is None else form(result[key])) for key, label, form in _ROWS if key in result]
    accuracy: Mapping[str, float | None] = result.get("accuracy") or {}
    counts: Mapping[str, int] = result.get("counts") or {}
    tasks = [
        (
            f"  {task}" + (f" ({counts[task]})" if task in counts else ""),
            "-" if share is None else _percent(share),
        )
        for task, share in accuracy.items()
    ]
    everything = rows + tasks
    if not everything:
        return ""
    names = max(len(name) for name, _ in everything)
    values = max(len(value) for _, value in everything)
    rule = "-" * (names + 2 + values)
    lines = [rule, *(f"{name:<{names}}  {value:>{values}}" for name, value in rows), rule]
    if tasks:
        title = "exact match per task" + (" (questions)" if counts else "")
        lines.append(title)
        lines.extend(f"{name:<{names}}  {value:>{values}}" for name, value in tasks)
        lines.append(rule)
    return "\n".join(lines)
