"""Writes ``megavlm/families/proven.json`` and the tables of docs/families.md from the rows of families.

    python tests/families/family_record.py            # make families-table

What is tried of each family is taken from the rows (``whole_rows.py``, ``text_cases.py``); what passed stays as runs of
tests have recorded it (``make families-record``, ``tests/proof_record.py``), as far as it is still tried.
"""

from __future__ import annotations

import inspect
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "families.md"
BEGIN, END = (
    "<!-- families-table: by `make families-table`; what is written here is lost -->",
    "<!-- families-table: end -->",
)
FIELDS = {
    "round_trip": "checkpoints", "tp2_pp2_sp": "source", "tp4_sp": "source", "uneven": "uneven", "others": "others",
    "check": "answers", "adapters": "lora", "sizes": "presets", "recipes": "recipes",
}  # fmt: skip
"""Of each point: the field of :class:`whole.WholeFamily` whose entries are tried."""
ONE = ("tp2_pp2_sp", "tp4_sp", "uneven", "check", "adapters")
"""Points that have one thing to try."""
MODELS = "tp2_pp2_sp"
"""The point by which language models alone are tried."""


def against(model: Any) -> str:
    """Return what a model is, for people: a class of Transformers, or a reference that is written out."""
    kind = type(model)
    if kind.__module__.startswith("transformers."):
        return f"Transformers' {kind.__name__}"
    return f"{kind.__name__}, written out in {Path(inspect.getfile(kind)).relative_to(ROOT)}"


def source_of(source: Any) -> str:
    """Return what a row's source is."""
    if hasattr(type(source), "model"):
        return against(source.model)
    return str(source.described)


def tried() -> dict[str, Any]:
    """Return what there is to prove of each family, in the order in which families are registered."""
    from published_totals import SOURCES
    from text_cases import ROWS as TEXTS
    from whole import Lack
    from whole_rows import ROWS

    from megavlm.config.load import load_recipe, shipped_recipes
    from megavlm.families.known import FAMILIES
    from megavlm.families.presets import expand_presets, load_presets

    load_presets()
    preset_of = {name: load_recipe(name, [], expand_presets).model.preset for name in shipped_recipes()}
    found: dict[str, Any] = {}
    for name in FAMILIES:
        row = ROWS.get(name)
        if row is None:
            continue
        presets = {} if isinstance(row.presets, Lack) else row.presets
        own = {
            "against": None if isinstance(row.source, Lack) else source_of(row.source),
            "presets": {
                preset: {"parameters": one.count, "read": preset in SOURCES} for preset, one in presets.items()
            },
            "recipes": [recipe for own in presets for recipe, preset in preset_of.items() if preset == own],
            "tried": {
                point: [""] if point in ONE else list(getattr(row, field))
                for point, field in FIELDS.items()
                if field not in row.lacks()
            },
            "lacks": {},
        }
        texts = {kind: text for kind, text in TEXTS.items() if text.family == name}
        if own["against"] is None and texts:
            own["against"] = ", ".join(sorted({against(text.make()) for text in texts.values()}))
            own["tried"][MODELS] = list(texts)
        for field, lack in row.lacks().items():
            if field != "source" or not texts:
                own["lacks"].setdefault(lack.reason, []).append(field)
        found[name] = own
    return found


def renewed(old: dict[str, Any]) -> dict[str, Any]:
    """Return the record with what is tried now, and of what passed that which is still tried."""
    found = tried()
    for name, own in found.items():
        passed = old.get(name, {}).get("passed", {})
        own["passed"] = {
            point: [entry for entry in entries if entry in passed.get(point, [])]
            for point, entries in own["tried"].items()
            if set(entries) & set(passed.get(point, []))
        }
    return found


def documented(text: str, record: dict[str, Any]) -> str:
    """Return the page with new tables; what stands around them is written by hand."""
    from megavlm.commands.models import markdown
    from megavlm.families.proven import proven

    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{DOCS} has no place for the tables"
    return f"{before}{BEGIN}\n\n{markdown(proven(record))}\n\n{END}{after}"


def main() -> None:
    """Write both."""
    from proof_record import RECORD, written

    record = renewed(json.loads(RECORD.read_text()) if RECORD.is_file() else {})
    RECORD.write_text(written(record))
    DOCS.write_text(documented(DOCS.read_text(), record))


if __name__ == "__main__":
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    sys.path[:0] = [str(ROOT / folder) for folder in [".", *options["pythonpath"]]]
    main()
