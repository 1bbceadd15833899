"""The small files of a prepared data set, before Energon reads them: what they ask for is bounded.

Energon writes out every alias and every ``{0..9}`` in the names of shards, and makes a plan of as many samples as are
promised; a data set may come from a stranger.
"""

from __future__ import annotations

import itertools
import json
import re
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megavlm.config import yaml12
from megavlm.config.errors import UserError
from megavlm.config.prepared import META

_INFO = ".info.json"
MOST_SHARDS = 1_000_000
_MOST_CHARACTERS = 64 << 20
_TAR_BLOCK = 512
_INDEX_ENTRY = 8
_LONGEST_NAME = 4096
_RANGE = re.compile(r"(-?\d+|[A-Za-z])\.\.(-?\d+|[A-Za-z])(?:\.\.-?(\d+))?")


def check_names(directory: Path) -> None:
    """Check how many shards a data set names, and how many samples it promises in them.

    Raises:
        UserError: they are more than there can be, or a file is damaged.
    """
    split = next((p for p in (directory / META / name for name in ("split.yaml", "split.json")) if p.is_file()), None)
    if split is not None:
        tree = _read(split)
        parts = tree.get("split_parts")
        names = [name for part in (parts.values() if isinstance(parts, Mapping) else ()) for name in part or ()]
        names += tree.get("exclude") or []
        shards = characters = 0
        for name in names:
            if not isinstance(name, str) or len(name) > _LONGEST_NAME:
                raise UserError(f"{split}: {name!r:.60} is no name of a shard; run megavlm prepare again")
            try:
                count = _expansions(name)
            except UserError as error:
                raise UserError(f"{split}: {error}; run megavlm prepare again") from None
            shards, characters = shards + count, characters + count * len(name)
            if shards > MOST_SHARDS or characters > _MOST_CHARACTERS:
                raise UserError(
                    f"{split}: {name[:60]!r} makes it more than {MOST_SHARDS:,} shards; correct the file, or run "
                    "megavlm prepare again"
                )
    info = directory / META / _INFO
    if not info.is_file():
        return
    counts = _read(info).get("shard_counts")
    for name, count in counts.items() if isinstance(counts, Mapping) else ():
        shard = directory / name
        if not isinstance(count, int) or not 0 <= count <= max(_TAR_BLOCK, _samples(shard)):
            raise UserError(
                f"{info}: promises {count!r:.30} samples in {name!r:.60}, more than its size can hold; run megavlm "
                "prepare again"
            )


def _samples(shard: Path) -> int:
    """Return a bound on the samples in a shard; either file may have been cut short."""
    index = shard.with_suffix(".tar.idx")
    sizes = [
        file.stat().st_size // unit for file, unit in ((shard, _TAR_BLOCK), (index, _INDEX_ENTRY)) if file.is_file()
    ]
    return max(sizes, default=0)


def _expansions(name: str) -> int:
    """Return how many names a pattern with braces stands for, without making them.

    Raises:
        UserError: its braces do not match.
    """
    count = 1
    for group in _groups(name):
        if match := _RANGE.fullmatch(group):
            first, last, step = match.groups()
            numbers = first.lstrip("-").isdigit() and last.lstrip("-").isdigit()
            span = abs(int(last) - int(first)) if numbers else len(string.ascii_letters)
            count *= span // (abs(int(step or 1)) or 1) + 1
        else:
            parts = _split(group)
            count *= sum(map(_expansions, parts))
    return count


def _groups(text: str) -> list[str]:
    """Return what stands in the outermost braces of a pattern."""
    found, depth, start = [], 0, 0
    for at, sign in _signs(text):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if depth < 0:
            break
        if sign == "{" and depth == 1:
            start = at + 1
        elif sign == "}" and depth == 0:
            found.append(text[start:at])
    if depth:
        raise UserError(f"the braces in {text[:60]!r} do not match")
    return found


def _split(group: str) -> list[str]:
    """Return the parts of a list: cut at commas outside of inner braces."""
    cuts, depth = [-1], 0
    for at, sign in _signs(group):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if sign == "," and depth == 0:
            cuts.append(at)
    return [group[a + 1 : b] for a, b in itertools.pairwise([*cuts, len(group)])]


def _signs(text: str) -> Iterator[tuple[int, str]]:
    """Yield position and sign of what is not behind a backslash."""
    escaped = False
    for at, sign in enumerate(text):
        if not escaped:
            yield at, sign
        escaped = sign == "\\" and not escaped


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text) if path.suffix == ".json" else yaml12.parse(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged: {error}; run megavlm prepare again") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: is damaged: it holds no names; run megavlm prepare again")
    return tree
