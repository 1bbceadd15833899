"""What was proven of each family, as its tests recorded it: ``proven.json`` beside this file. Imports no torch.

The file is machine-written (``make families-table``, ``make families-record``: tests/families/family_record.py): what
is to be tried comes from the rows of tests/families/whole_rows.py, what passed from runs of those tests. A family that
is not in it, or of which nothing passed yet, has no proof, and is shown so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megavlm.families.known import FAMILIES
from megavlm.families.presets import load_presets

RECORD = Path(__file__).with_name("proven.json")

POINTS: dict[str, str] = {
    "round_trip": "weights there and back, bit for bit",
    "tp2_pp2_sp": "features, logits, losses, gradients, packs, three steps and answers, at one process and at"
    " TP 2 x PP 2 + SP",
    "tp4_sp": "the same at TP 4 + SP",
    "uneven": "the same at TP 2 x PP 2 + SP where TP divides no heads",
    "others": "the same at TP 2 x PP 2 + SP with other published parts",
    "check": "megavlm convert check: the class with its processor, on pictures that are not square",
    "adapters": "adapters to PEFT and back, merged",
    "sizes": "parameters of the presets, at TP 1, 2, 4 and 8",
    "recipes": "numbers of the recipes",
}
"""What tests prove of a family, each by the name that ``pytest.mark.proves`` has for it."""

_LAYOUTS = {"tp2_pp2_sp": "1, TP 2 x PP 2 + SP", "tp4_sp": "TP 4 + SP", "uneven": "uneven heads"}
_NOTHING = "-"


@dataclass(frozen=True)
class Proven:
    """A family, and what was proven of it.

    Attributes:
        name: the family.
        title: for people.
        whole: whether it is a model of tower, connector and language model.
        against: what its numbers are held against; None where there is nothing.
        presets: parameters of its presets; text where the number was read nowhere else, and is rounded.
        unread: presets whose total was found in no second place.
        recipes: that are shipped.
        tried: what its tests try, by point: a checkpoint, a preset, .. each; "" where a point has one thing to try.
        passed: of these what passed when it was recorded.
        lacks: reasons why it does not have fields of its row, and which.
    """

    name: str
    title: str
    whole: bool
    against: str | None = None
    presets: Mapping[str, int | str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    recipes: tuple[str, ...] = ()
    tried: Mapping[str, list[str]] = field(default_factory=dict)
    passed: Mapping[str, list[str]] = field(default_factory=dict)
    lacks: Mapping[str, list[str]] = field(default_factory=dict)

    def share(self, point: str) -> str:
        """Return how much of a point passed: yes, "3 of 4", "no proof recorded"; "-" where there is no such point."""
        tried = self.tried.get(point, [])
        there = [one for one in tried if one in self.passed.get(point, [])]
        if not tried:
            return _NOTHING
        if not there:
            return "no proof recorded"
        if len(there) < len(tried):
            return f"{len(there)} of {len(tried)}"
        return f"yes ({len(tried)})" if tried != [""] else "yes"

    @property
    def layouts(self) -> str:
        """The layouts at which all that is tried of it passed."""
        tried = [point for point in _LAYOUTS if self.tried.get(point)]
        found = [_LAYOUTS[point] for point in tried if set(self.tried[point]) <= set(self.passed.get(point, []))]
        return "; ".join(found) or ("no proof recorded" if tried else _NOTHING)

    @property
    def parity(self) -> str:
        """What its numbers are held against, or why there is nothing."""
        if self.against is not None:
            return self.against
        found = (reason for reason, fields in self.lacks.items() if "source" in fields)
        return next(found, "no proof: no test of this family is recorded")


def proven(record: Mapping[str, Any] | None = None) -> list[Proven]:
    """Return every registered family, whole models first, with what is recorded of it.

    Args:
        record: another than what is committed.
    """
    load_presets()
    tree = json.loads(RECORD.read_text(encoding="utf-8")) if record is None else record
    found = []
    for name, family in FAMILIES.items():
        own = tree.get(name, {})
        presets = {preset: one["parameters"] for preset, one in own.get("presets", {}).items()}
        found.append(
            Proven(
                name=name,
                title=family.title,
                whole={"vision", "connector", "language"} <= {*family.parts},
                against=own.get("against"),
                presets=presets,
                unread=tuple(preset for preset, one in own.get("presets", {}).items() if not one["read"]),
                recipes=tuple(own.get("recipes", ())),
                tried=own.get("tried", {}),
                passed=own.get("passed", {}),
                lacks=own.get("lacks", {}),
            )
        )
    return sorted(found, key=lambda one: (not one.whole, not one.presets))
