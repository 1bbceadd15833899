"""What is not imported as ``-m`` asks for nothing of it."""

from __future__ import annotations

import re
from pathlib import Path

import mark_choice
import pytest
from import_graph import ROOT


def test_only_a_plain_list_of_marks_leaves_files_out() -> None:
    assert mark_choice.wanted("long and not family") == {"long"}
    assert mark_choice.wanted("long and family") == {"long", "family"}
    assert mark_choice.wanted("slurm") == {"slurm"}
    for other in ("", "not long and not full", "long or family", "not (long and family)", "long and (family or full)"):
        assert not mark_choice.wanted(other), other


def test_every_mark_that_a_target_asks_for_is_watched() -> None:
    lines = re.findall(r"-m pytest .*? -m (?:'(.*?)'|(\w+))", (ROOT / "Makefile").read_text())
    terms = {term for quoted, plain in lines for term in (quoted or plain).split(" and ")}
    assert {term for term in terms if not term.startswith("not ")} == mark_choice.PICKED


@pytest.mark.parametrize("mark", sorted(mark_choice.PICKED))
def test_a_file_is_left_out_for_want_of_a_mark_alone(mark: str, tmp_path: Path) -> None:
    with_it, without = tmp_path / "test_with.py", tmp_path / "test_without.py"
    with_it.write_text(f"import pytest\npytestmark = pytest.mark.{mark}\n")
    without.write_text(f"{mark} = 'a mark.{mark}er'\n")
    assert mark_choice.named(with_it) == {mark} and not mark_choice.named(without)


def test_a_mark_from_elsewhere_is_an_error(request: pytest.FixtureRequest) -> None:
    """Of this very test, whose file names no such mark."""
    assert "learning" not in mark_choice.named(Path(__file__))
    request.node.add_marker("learning")
    with pytest.raises(pytest.UsageError, match=f"{re.escape(Path(__file__).name)} must name {'mark'}.learning"):
        mark_choice.pytest_collection_modifyitems([request.node])
