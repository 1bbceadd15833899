"""Which families' tests run after a change, and how long they may take."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import ranks
from family_choice import PARTS as ALL_PARTS
from family_choice import changed_of, changed_since, choose
from import_graph import TESTS

VIT = {"qwen_vl", "codefuse_vlm", "llava", "clip", "siglip", "qwen_visual"}
PARTS = {name: ALL_PARTS[name] for name in (*sorted(VIT), "qwen", "llama", "mm_projector")}
"""Some families, so that another one changes no test here."""


@pytest.mark.parametrize(
    ("path", "families"),
    [
        ("megavlm/families/llava.py", {"llava"}),
        ("megavlm/families/llama.py", {"llama", "llava"}),  # llava imports it
        ("megavlm/architectures/connectors/resampler/build.py", {"qwen_vl", "codefuse_vlm", "mm_projector"}),
        ("megavlm/architectures/connectors/mlp/cost.py", {"llava", "codefuse_vlm", "mm_projector"}),
        ("megavlm/architectures/towers/vit/gone.py", VIT),  # was removed
        ("megavlm/architectures/cost.py", set(PARTS)),  # every architecture imports it
        ("megavlm/families/known.py", set()),  # a list of all
        ("megavlm/layers/attention.py", set(PARTS)),
        ("megavlm/weights/rules.py", set(PARTS)),
        ("megavlm/training/step.py", set(PARTS)),
        ("megavlm/gone.py", set(PARTS)),
        ("constraints.txt", set(PARTS)),
        (".ci/run", set(PARTS)),
        ("tests/conftest.py", set(PARTS)),
        ("megavlm/quickstart/render.py", set()),
        ("megavlm/inference/server/web.py", set()),
        ("megavlm/evaluation/benchmarks/vqa.py", set()),
        ("docs/data.md", set()),
        ("benchmarks/lora.py", set()),
    ],
)
def test_families_of_a_change(path: str, families: set[str]) -> None:
    assert choose([path], PARTS).families == families


def test_several_files_and_tests_that_changed() -> None:
    choice = choose(["megavlm/families/llava.py", "docs/data.md", "tests/models/qwen_reference.py"], PARTS)
    assert choice.families == {"llava"}
    names = {path.name for path in choice.files}
    assert {"test_reference.py", "test_round_trips.py"} <= names  # the second by family_cases
    assert "test_packing.py" not in names
    # What ranks are told to run by name is a helper too.
    files = choose(["tests/training/layout_worker.py", "tests/architectures/connector_cases.py"], PARTS).files
    assert "test_connectors.py" in {path.name for path in files}


def test_a_family_from_elsewhere_has_the_parts_that_its_mark_says() -> None:
    families = {**PARTS, "made_up": ("towers.vit",), "text": ()}
    assert choose(["megavlm/architectures/towers/vit/build.py"], families).families == {*VIT, "made_up"}


class Options:
    """What a test that walks models asks of pytest's configuration."""

    def __init__(self, base: str | None) -> None:
        self.base = base

    def getoption(self, name: str) -> str | None:
        assert name == "--changed-since"
        return self.base


@pytest.mark.parametrize(
    ("path", "models"),
    [
        ("megavlm/architectures/connectors/resampler/build.py", "a"),
        ("megavlm/architectures/towers/sam/build.py", "b"),
        ("megavlm/architectures/decoders/decoder/build.py", "abc"),  # Mamba imports it
        ("megavlm/architectures/decoders/mamba/build.py", "c"),
        ("megavlm/architectures/towers/new_one/__init__.py", "abc"),  # nobody knows it yet
        ("megavlm/families/llava.py", ""),
        ("megavlm/evaluation/benchmarks/vqa.py", ""),
        ("docs/data.md", ""),
        ("megavlm/layers/attention.py", "abc"),
        ("megavlm/parallel/pipeline.py", "abc"),
        ("megavlm/training/step.py", "abc"),
        ("megavlm/models/vlm.py", "abc"),
        ("megavlm/checkpoint/saver.py", "abc"),
        ("megavlm/families/presets.py", "abc"),
        ("megavlm/architectures/cost.py", "abc"),
        ("constraints.txt", "abc"),
        ("tests/conftest.py", "abc"),
        ("tests/training/placement_cases.py", "abc"),  # a helper of the file that asks
        ("tests/evaluation/benchmark_worker.py", ""),
    ],
)
def test_models_of_a_change_that_one_test_walks(path: str, models: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {
        "a": ["towers.vit", "connectors.resampler", "decoders.decoder"],
        "b": ["towers.sam", "connectors.mlp", "decoders.decoder"],
        "c": ["towers.packed_vit", "connectors.mlp", "decoders.mamba"],
    }
    asks = TESTS / "training" / "test_every_part.py"
    monkeypatch.setattr("family_choice.changed_since", lambda base: [path] if base == "here" else None)
    assert "".join(changed_of(Options("here"), asks, parts)) == models  # type: ignore[arg-type]
    for base in (None, "all", "what git does not know"):
        assert "".join(changed_of(Options(base), asks, parts)) == "abc"  # type: ignore[arg-type]


def git(root: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *identity, *words], cwd=root, check=True, capture_output=True, text=True
    ).stdout.strip()


def commit(root: Path, name: str) -> str:
    (root / name).write_text(name)
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", name)
    return git(root, "rev-parse", "HEAD")


def test_what_changed_since_a_commit(tmp_path: Path) -> None:
    root = tmp_path / "repository"
    root.mkdir()
    assert changed_since("auto", root) is None  # no git here
    git(root, "init", "-q", "-b", "main")
    first = commit(root, "one")
    assert changed_since("auto", root) is None  # no commit before
    commit(root, "two")
    commit(root, "three")
    assert changed_since("auto", root) == ["three"]  # no origin: the commit before
    assert sorted(changed_since(first, root) or ()) == ["three", "two"]
    assert changed_since("no-such-commit", root) is None
    git(root, "update-ref", "refs/remotes/origin/main", first)
    (root / "one").unlink()
    (root / "fo\u00fcr x").write_text("not committed")
    assert sorted(changed_since("auto", root) or ()) == ["fo\u00fcr x", "one", "three", "two"]
    git(root, "update-ref", "refs/remotes/origin/main", "HEAD")
    git(root, "checkout", "-q", "one")
    assert sorted(changed_since("auto", root) or ()) == ["fo\u00fcr x", "three"]  # main itself: the commit before


HOOKS = """
import family_choice
from family_choice import *
from family_choice import pytest_addoption, pytest_collection_modifyitems, pytest_runtest_protocol
family_choice.BUDGET = 0.2
family_choice.yardstick.slowness = lambda: 1.0  # what is busy below is so by the clock
family_choice.changed_since = lambda base: ["megavlm/families/llava.py"] if base == "here" else None
"""
FILE = """
import pytest
def busy():
    import time
    until = time.process_time() + 0.15
    while time.process_time() < until:
        pass
@pytest.mark.family("made_up", parts=["towers.vit"])
def test_a(): busy()
@pytest.mark.family("llava")
def test_b(): pass
@pytest.mark.family("llava")
@pytest.mark.long
def test_c(): busy(), busy()
@pytest.mark.family("made_up", parts=["towers.vit"])
def test_d(): busy()
def test_e(): busy(), busy()
"""


def said(directory: Path, *words: str) -> tuple[int, str]:
    script = directory / "run.py"
    script.write_text("import sys, pytest\nsys.exit(pytest.main(sys.argv[1:]))")
    fixed = ["-q", "-p", "no:cacheprovider", f"--rootdir={directory}", str(directory)]
    env = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "", "PYTEST_XDIST_WORKER": ""}
    done = ranks.script(script, *fixed, *words, world=None, check=False, env=env)
    return done.code, done.output


def test_pytest_runs_the_chosen_ones_and_holds_the_budget(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(HOOKS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    family: f\n    long: l\n")
    (tmp_path / "test_file.py").write_text(FILE)
    code, text = said(tmp_path)
    assert code == 1 and "5 passed" in text  # each passed, and one family took too long
    assert "short tests of family made_up took" in text and "of family llava" not in text
    code, text = said(tmp_path, "--changed-since", "here", "-m", "long")
    assert code == 0 and "1 passed, 4 deselected" in text
    assert re.search(r"families \(by what changed\): .*\bllava\b", text)  # and others that import its file
    code, text = said(tmp_path, "--changed-since", "here", "-m", "long and not family")
    assert code == 0 and "5 deselected" in text  # nothing to do is right
    # All; and the budget again, of what two processes took together, each less than that.
    code, text = said(tmp_path, "--changed-since", "unknown", "-m", "family", "-p", "xdist", "-n", "2")
    assert code == 1 and "4 passed" in text and "families (git knows no 'unknown'): " in text
    assert "short tests of family made_up took" in text
    (tmp_path / "test_file.py").write_text('import pytest\n@pytest.mark.family("nobody")\ndef test_a(): pass\n')
    code, text = said(tmp_path)
    assert code == 4 and "family 'nobody' is not in PARTS" in text
