"""``megavlm models``: the families, their sizes and recipes, and what was proven of each."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import textwrap
from collections.abc import Sequence

from megavlm.config.errors import UserError
from megavlm.families.proven import POINTS, Proven, proven

_MOST = 100
"""Characters of a line, at most."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "List the families of models, their presets and recipes, and what the tests have proven of each. With a"
        " FAMILY, or the name of a preset, show all of it."
    )
    parser.add_argument("name", nargs="?", metavar="FAMILY", help="a family, or a preset: show all that is known of it")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the table, or one family.

    Raises:
        UserError: there is no such family.
    """
    found = proven()
    if args.name is not None:
        found = [one for one in found if args.name == one.name or args.name in one.presets]
        if not found:
            names = ", ".join(one.name for one in proven())
            raise UserError(f"{args.name!r} is neither a family nor a preset of one; families: {names}")
    if args.json:
        text = json.dumps([dataclasses.asdict(one) for one in found], indent=2, ensure_ascii=False)
    elif args.name is not None:
        text = "\n\n".join(described(one) for one in found)
    else:
        text = listing(found, min(shutil.get_terminal_size((_MOST, 24)).columns, _MOST))
    print(text)  # noqa: T201 - what was asked for
    return 0


def size_of(parameters: int | str) -> str:
    """Return a number of parameters as people say it: 938M, 7.06B."""
    if isinstance(parameters, str):
        return parameters
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"


def shortened(names: Sequence[str]) -> str:
    """Return names with what they share at the start said once: ``gemma3_{4b,12b}``; of recipes, by stages."""
    groups: dict[str, list[str]] = {}
    for name in names:
        head, slash, last = name.rpartition("/")
        groups.setdefault(head if slash else "", []).append(last)
    alike: dict[str, list[str]] = {}
    for head, lasts in groups.items():
        if head:
            alike.setdefault(_braced("", lasts), []).append(head)
    found = [f"{one}/{stages}" for stages, heads in alike.items() for one in _braced_names(heads)]
    return ", ".join([*_braced_names(groups.get("", [])), *found])


def _braced(head: str, lasts: Sequence[str]) -> str:
    return f"{head}{lasts[0]}" if len(lasts) == 1 else f"{head}{{{','.join(lasts)}}}"


def _braced_names(names: Sequence[str]) -> list[str]:
    """Group names whose last piece alone differs: that behind the last underscore."""
    groups: dict[str, list[str]] = {}
    for name in names:
        match = re.fullmatch(r"(.*_)?([^_]*)", name)
        assert match is not None
        groups.setdefault(match[1] or "", []).append(match[2])
    return [_braced(head, lasts) for head, lasts in groups.items()]


def listing(found: Sequence[Proven], width: int) -> str:
    """Return the table for a terminal: a line each, and what does not fit below it."""
    lines: list[str] = []
    for title, whole in (("WHOLE MODELS", True), ("PARTS, AND OTHER LAYOUTS", False)):
        lines += ["", title] if lines else [title]
        for one in found:
            if (one.whole and bool(one.presets)) != whole:
                continue
            lines += ["", f"{one.name}: {one.title}"]
            sizes = [f"{name} {size_of(count)}" for name, count in one.presets.items()]
            rows = {
                "presets": ", ".join(sizes),
                "recipes": shortened(one.recipes),
                "held against": one.parity,
                "layouts": one.layouts if one.against is not None else "",
                "there and back": one.share("round_trip"),
            }
            for key, value in rows.items():
                if value not in ("", "-"):
                    head = f"  {key}: "
                    lines += textwrap.wrap(value, width, initial_indent=head, subsequent_indent="    ") or [head]
    lines += ["", "megavlm models FAMILY shows all points of a family. None of it says that real weights were loaded:"]
    lines += ["run megavlm convert check on yours."]
    return "\n".join(lines)


def described(one: Proven) -> str:
    """Return all that is known of a family."""
    lines = [f"{one.name}: {one.title}", f"  held against: {one.parity}"]
    if one.presets:
        lines.append("  presets:")
        for name, count in one.presets.items():
            exact = f"{count:,}" if isinstance(count, int) else count
            doubt = " (its total was found in no second place)" if name in one.unread else ""
            lines.append(f"    {name}: {exact} parameters{doubt}")
    lines += ["  recipes:", *[f"    {name}" for name in one.recipes]] if one.recipes else []
    lines.append("  proven:")
    for point, words in POINTS.items():
        share = one.share(point)
        if share != "-":
            lines.append(f"    {words}: {share}")
            missing = [entry for entry in one.tried[point] if entry not in one.passed.get(point, []) and entry]
            lines += [f"      not recorded: {', '.join(missing)}"] if missing else []
    lines += ["  not there:"] if one.lacks else []
    lines += [f"    {', '.join(points)}: {reason}" for reason, points in one.lacks.items()]
    return "\n".join(lines)


def markdown(found: Sequence[Proven]) -> str:
    """Return the tables of docs/families.md."""
    whole = [one for one in found if one.whole and one.presets]
    lines = [
        "| family | presets | recipes | held against | layouts | there and back |",
        "|---|---|---|---|---|---|",
    ]
    for one in whole:
        sizes = sorted({size_of(count) for count in one.presets.values()}, key=_number)
        presets = f"`{shortened(list(one.presets))}`: {', '.join(sizes)}"
        recipes = f"`{shortened(one.recipes)}`" if one.recipes else "none"
        cells = [f"`{one.name}`", presets, recipes, one.parity, one.layouts, one.share("round_trip")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| part, or other layout | what | held against | there and back |", "|---|---|---|---|"]
    for one in found:
        if one not in whole:
            lines.append(f"| `{one.name}` | {one.title} | {one.parity} | {one.share('round_trip')} |")
    points = [point for point in POINTS if point not in ("round_trip", "tp2_pp2_sp", "tp4_sp")]
    lines += [
        "",
        "Further points, `make test-families` (uneven: heads that TP does not divide; others: other parts):",
        "",
    ]
    lines += [f"| family | {' | '.join(points)} |", f"|---{'|---' * len(points)}|"]
    for one in whole:
        lines.append(f"| `{one.name}` | {' | '.join(one.share(point) for point in points)} |")
    return "\n".join(lines)


def _number(size: str) -> float:
    return float(size[:-1]) * {"M": 1e6, "B": 1e9}[size[-1]]
