"""``megavlm models``, its record and docs/families.md say what the tests of families try, and what passed of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from family_record import DOCS, FIELDS, documented, renewed
from proof_record import RECORD, merged, written

from megavlm.cli import main
from megavlm.families.known import FAMILIES
from megavlm.families.proven import POINTS, proven


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads(RECORD.read_text())


def test_record_and_page_are_those_of_the_rows(record: dict[str, Any]) -> None:
    """A family that was added, or a point of one: ``make families-table``."""
    assert FIELDS.keys() == POINTS.keys()
    assert RECORD.read_text() == written(renewed(record)), "make families-table"
    assert DOCS.read_text() == documented(DOCS.read_text(), record), "make families-table"


def test_what_failed_is_no_proof_any_more(record: dict[str, Any]) -> None:
    name, own = next((name, own) for name, own in record.items() if own["passed"].get("round_trip"))
    entry = own["passed"]["round_trip"][0]
    failed = merged(record, {(name, "round_trip", entry): False})
    assert entry not in failed[name]["passed"]["round_trip"]
    assert merged(failed, {(name, "round_trip", entry): True})[name]["passed"].keys() == own["passed"].keys()


def test_a_family_without_proof_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One that no row knows (of a package beside this one), and one whose tests were not recorded."""
    shown = {one.name: one for one in proven({"llava": {"against": "it", "tried": {"tp4_sp": [""]}}})}
    assert shown.keys() == FAMILIES.keys()
    assert shown["gemma3"].parity == "no proof: no test of this family is recorded"
    assert shown["llava"].layouts == shown["llava"].share("tp4_sp") == "no proof recorded"
    assert shown["llava"].share("uneven") == "-"


def test_the_command(capsys: pytest.CaptureFixture[str], record: dict[str, Any]) -> None:
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n{name}: " in text for name in FAMILIES)
    assert max(map(len, text.splitlines())) <= 100
    assert main(["models", "paligemma_3b_224"]) == 0
    text = capsys.readouterr().out
    assert "paligemma_3b_224: 2,923,466,480 parameters\n" in text and "paligemma_3b_224/transfer" in text
    assert "held against: Transformers' PaliGemmaForConditionalGeneration" in text
    assert main(["models", "--json", "paligemma"]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert one["passed"] == record["paligemma"]["passed"] and one["tried"] == record["paligemma"]["tried"]
    assert main(["models", "palegemma"]) == 2
    assert "'palegemma' is neither a family nor a preset of one; families: " in capsys.readouterr().err
