"""Tests of one family: marked ``family(name)``, held to a budget, and left out where nothing of theirs has changed.

A test of published families says so::

    @pytest.mark.family("llava")                         # what the family is made of: PARTS, below
    @pytest.mark.family("made_up", parts=["towers.vit"])  # or here, for one that is not the package's

``make test`` runs those that are not ``long``: at most :data:`BUDGET` seconds a family, or it fails.
``make test-families`` runs the long ones of the families that changed since a commit: ``--changed-since COMMIT``, or
``auto`` (where the branch left origin/main; the commit before, where it did not), or ``all``. CONTRIBUTING.md has more.
"""

from __future__ import annotations

import functools
import resource
import subprocess
import time
from collections import defaultdict
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import import_graph
import pytest
import yardstick
from import_graph import ROOT

BUDGET = 20.0
"""Seconds of a family's tests in ``make test``, of a core such as :data:`yardstick.QUIET` is of (a slower or busier one
has as many times longer): of the clock or of the processors, whichever is less, so that another
program on the machine does not count."""

PARTS: dict[str, tuple[str, ...]] = {
    "qwen_vl": ("towers.vit", "connectors.resampler", "decoders.decoder"),
    "codefuse_vlm": ("towers.vit", "connectors.resampler", "connectors.mlp", "decoders.decoder"),
    "llava": ("towers.vit", "connectors.mlp", "decoders.decoder"),
    "llava_original": ("towers.vit", "connectors.mlp", "decoders.decoder"),
    "llava_original_apart": ("towers.vit", "connectors.mlp", "decoders.decoder"),
    **dict.fromkeys(
        ("bunny", "imp", "mipha", "llava_phi", "allava", "moe_llava"),
        ("towers.vit", "connectors.mlp", "decoders.decoder"),
    ),
    "llava_next": ("towers.vit", "connectors.mlp", "decoders.decoder"),
    "llava_onevision": ("towers.vit", "connectors.mlp", "decoders.decoder"),
    "paligemma": ("towers.vit", "connectors.mlp", "decoders.decoder"),
    "mllama": ("towers.tiled_vit", "connectors.mlp", "decoders.decoder"),
    "blip2": ("towers.vit", "connectors.q_former", "decoders.decoder"),
    "minigpt4": ("towers.vit", "connectors.q_former", "decoders.decoder"),
    "tinygpt_v": ("towers.vit", "connectors.q_former", "decoders.decoder"),
    "minigpt_v2": ("towers.vit", "connectors.patch_reducer", "decoders.decoder"),
    "gemma3": ("towers.vit", "connectors.patch_reducer", "decoders.decoder"),
    "deepseek_vl": ("towers.vit", "connectors.mlp", "decoders.decoder"),
    "deepseek_vl_hybrid": (
        "towers.vit_sam",
        "towers.vit",
        "towers.sam",
        "connectors.hybrid_split",
        "connectors.mlp",
        "decoders.decoder",
    ),
    "deepseek_vl_original": ("towers.vit", "connectors.mlp", "decoders.decoder"),
    "vary": ("towers.vit_sam", "towers.vit", "towers.sam", "connectors.hybrid_split", "decoders.decoder"),
    "idefics3": ("towers.vit", "connectors.patch_reducer", "decoders.decoder"),
    "smolvlm": ("towers.vit", "connectors.patch_reducer", "decoders.decoder"),
    "chameleon": ("towers.vq_gan", "connectors.codes", "decoders.decoder"),
    "cogagent": ("towers.vit", "towers.vit_vit", "connectors.glu", "decoders.decoder"),
    "cobra": ("towers.vit", "towers.vit_vit", "connectors.mlp", "decoders.mamba"),
    "cogvlm": ("towers.vit", "connectors.glu", "decoders.decoder"),
    "minicpm_v": ("towers.vit", "connectors.resampler", "decoders.decoder"),
    "minicpm_v_2": ("towers.packed_vit", "connectors.resampler_2d", "decoders.decoder"),
    "minicpm_llama3_v_2_5": ("towers.packed_vit", "connectors.resampler_2d", "decoders.decoder"),
    "internvl": ("towers.vit", "connectors.pixel_shuffle", "decoders.decoder"),
    "qwen2_vl": ("towers.packed_vit", "connectors.patch_merger", "decoders.decoder"),
    "qwen2_5_vl": ("towers.packed_vit", "connectors.patch_merger", "decoders.decoder"),
    "qwen3_vl": ("towers.packed_vit", "connectors.patch_merger", "decoders.decoder"),
    "qwen3_vl_moe": ("towers.packed_vit", "connectors.patch_merger", "decoders.decoder"),
    "glm4v": ("towers.packed_vit", "connectors.downsample_merger", "decoders.decoder"),
    "glm4v_moe": ("towers.packed_vit", "connectors.downsample_merger", "decoders.decoder"),
    "llava_onevision1_5": ("towers.packed_vit", "connectors.patch_merger", "decoders.decoder"),
    "mobilevlm": ("towers.vit", "connectors.ldp", "decoders.decoder"),
    "dense_connector": ("towers.vit", "connectors.dense_connector", "decoders.decoder"),
    "minigemini": (
        "towers.vit_convnext",
        "towers.vit",
        "towers.convnext",
        "connectors.patch_mining",
        "connectors.mlp",
        "decoders.decoder",
    ),
    "xtuner": ("towers.vit", "connectors.mlp", "decoders.decoder"),
    "hpt": ("towers.vit", "connectors.mlp", "decoders.decoder"),
    "tinyllava": ("towers.vit", "connectors.mlp", "decoders.decoder"),
    "internvl_chat": ("towers.vit", "connectors.pixel_shuffle", "decoders.decoder"),
    "intern_vit": ("towers.vit",),
    "qwen": ("decoders.decoder",),
    "llama": ("decoders.decoder",),
    "phi": ("decoders.decoder",),
    "phi3": ("decoders.decoder",),
    "gemma": ("decoders.decoder",),
    "gemma3_text": ("decoders.decoder",),
    "glm4": ("decoders.decoder",),
    "stablelm": ("decoders.decoder",),
    "qwen3_moe": ("decoders.decoder",),
    "mixtral": ("decoders.decoder",),
    "glm4_moe": ("decoders.decoder",),
    "deepseek_v2": ("decoders.decoder",),
    "internlm2": ("decoders.decoder",),
    "minicpm": ("decoders.decoder",),
    "mamba": ("decoders.mamba",),
    "t5": ("decoders.encoder_decoder",),
    "clip": ("towers.vit",),
    "siglip": ("towers.vit",),
    "siglip2": ("towers.packed_vit",),
    "dinov2": ("towers.vit",),
    "eva02": ("towers.vit",),
    "qwen_visual": ("towers.vit",),
    "mm_projector": ("connectors.mlp", "connectors.resampler"),
}
"""The architectures of each family, as folders of ``megavlm/architectures``; test_family_choice.py compares them with
checkpoints of every family."""

ENTRIES = ("megavlm.cli", "megavlm.commands.convert", "megavlm.commands.train", "megavlm.commands.generate")
"""What tests of families start with. What these import, and belongs to no family, is the core."""
LISTS = frozenset(
    {
        "megavlm.families.known", "megavlm.architectures.towers",
        "megavlm.architectures.connectors", "megavlm.architectures.decoders",
    }
)  # fmt: skip
"""Lists of what there is: another line in one changes no family, and the short tests, which always run, read them."""
_ROOMS = ("megavlm.families.", "megavlm.architectures.")
_NO_MATTER = ("docs/", "examples/", "benchmarks/", "tools/", "tests/golden/")
_NO_MATTER_ENDS = (".md", ".png", ".jpg", "LICENSE", "Dockerfile", ".gitignore", ".dockerignore")


@dataclass(frozen=True)
class Choice:
    """What ``make test-families`` runs."""

    families: frozenset[str]
    files: frozenset[Path]
    """Test files that changed, or whose helpers did: all of their tests."""
    why: str


def family_file(name: str) -> str | None:
    """Return the module of a family; None for one that is not the package's."""
    from megavlm.families.known import FAMILIES

    return type(FAMILIES[name]).__module__ if name in FAMILIES else None


@functools.cache
def _package() -> tuple[dict[str, Path], dict[str, set[str]], set[str]]:
    """Return the package's files, what each imports, and the core."""
    known = import_graph.modules()
    core = import_graph.closure(ENTRIES, import_graph.graph(known, named=True))
    return known, import_graph.graph(known), core


def choose(changed: Iterable[str], families: Mapping[str, Collection[str]]) -> Choice:
    """Return whose tests have to run.

    Args:
        changed: files, relative to the root.
        families: the parts of each family.
    """
    known, edges, core = _package()
    names = {path.relative_to(ROOT).as_posix(): name for name, path in known.items()}
    own: dict[str, set[str]] = {}
    apart = {name: set() if name in LISTS else others for name, others in edges.items()}
    folders = {family: tuple(f"megavlm.architectures.{part}." for part in parts) for family, parts in families.items()}
    for family, its in folders.items():
        start = {name for name in known if its and f"{name}.".startswith(its)}
        start |= {file} if (file := family_file(family)) else set()
        own[family] = {
            one for one in import_graph.closure(start, apart, parents=False) if one.startswith(_ROOMS)
        } - LISTS
    architectures = {
        ".".join(name.split(".")[:4]) for name in known if name.startswith(_ROOMS[1]) and name.count(".") > 2
    }
    chosen: set[str] = set()
    helpers: set[str] = set()
    for path in changed:
        if path.startswith(_NO_MATTER) or path.endswith(_NO_MATTER_ENDS):
            continue
        if path.startswith("tests/"):
            if path.endswith("conftest.py") or not path.endswith(".py"):
                return Choice(frozenset(families), frozenset(), f"{path} concerns all tests")
            helpers.add(Path(path).stem)
            continue
        name = names.get(path) or ".".join(Path(path).with_suffix("").parts).removesuffix(".__init__")
        owners = {
            family
            for family, modules in own.items()
            if name in modules or (folders[family] and f"{name}.".startswith(folders[family]))  # also what was removed
        }
        chosen |= owners
        belongs = owners or name in LISTS or ".".join(name.split(".")[:4]) in architectures
        elsewhere = name in known and name not in core
        if not belongs and not elsewhere:
            return Choice(frozenset(families), frozenset(), f"{path} belongs to the core")
    return Choice(frozenset(chosen), _files_of(helpers), "by what changed")


def _files_of(helpers: Collection[str]) -> frozenset[Path]:
    """Return the test files that are, or import, one of ``helpers``."""
    if not helpers:
        return frozenset()
    files = import_graph.test_files()
    edges = import_graph.graph(files, named=True)
    return frozenset(path for name, path in files.items() if import_graph.closure([name], edges) & set(helpers))


def changed_since(base: str, root: Path = ROOT) -> list[str] | None:
    """Return the files that differ from commit ``base``, also those that are not committed; None if git cannot say."""

    def git(*words: str) -> list[str]:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.split("\0") if "-z" in words else done.stdout.split()

    try:
        if base == "auto":
            base = _where_we_left(git)
        # Renames as a removal and an addition: what was there counts too.
        paths = git("diff", "--name-only", "--no-renames", "-z", base) + git(
            "ls-files", "-z", "-o", "--exclude-standard"
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return [path for path in paths if path]


def _where_we_left(git: object) -> str:
    """Return the commit where this branch left origin/main; on main itself the commit before."""
    assert callable(git)
    head = git("rev-parse", "HEAD")[0]
    try:
        base = git("merge-base", "origin/main", "HEAD")[0]
    except subprocess.CalledProcessError:  # there is no origin
        base = head
    return git("rev-parse", "HEAD~1")[0] if base == head else base


# What pytest calls; tests/conftest.py takes it from here.

_spent: dict[str, float] = defaultdict(float)
_choice: Choice | None = None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--changed-since", metavar="COMMIT", help="only tests of families that changed since then; or: auto, all"
    )
    parser.addoption("--record-proofs", action="store_true", help="write what passed (tests/proof_record.py)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what ``--changed-since`` need not run."""
    global _choice
    families: dict[str, tuple[str, ...]] = dict(PARTS)
    for item in items:
        for mark in item.iter_markers("family"):
            for name in mark.args:
                parts = mark.kwargs.get("parts")
                if parts is None and name not in families:
                    raise pytest.UsageError(f"{item.nodeid}: family {name!r} is not in PARTS; give its parts=[...]")
                families[name] = (*families.get(name, ()), *(parts or ()))
    base = config.getoption("--changed-since")
    if base is None:
        return
    changed = None if base == "all" else changed_since(base)
    if changed is None:
        _choice = Choice(frozenset(families), frozenset(), "all" if base == "all" else f"git knows no {base!r}")
    else:
        _choice = choose(changed, families)
    kept = [item for item in items if _of_any(item) & _choice.families or item.path in _choice.files]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def changed_of(config: pytest.Config, path: Path, parts: Mapping[str, Collection[str]]) -> list[str]:
    """Return which of the models that one test walks have to be walked: all, unless ``--changed-since`` chose.

    Args:
        config: pytest's.
        path: the test's file; where it or a helper of it changed, all are walked.
        parts: of each model the parts, as those of a family; the test is marked with all of them together.
    """
    base = config.getoption("--changed-since")
    changed = None if base in (None, "all") else changed_since(base)
    if changed is None:
        return list(parts)
    models = {f"model {name}": its for name, its in parts.items()}
    choice = choose(changed, {**PARTS, **models})  # else what belongs to a family would be the core's
    return [name for name in parts if f"model {name}" in choice.families or path in choice.files]


def families_of(item: pytest.Item) -> set[str]:
    """Return the families that a test is marked with."""
    return {name for mark in item.iter_markers("family") for name in mark.args}


def _of_any(item: pytest.Item) -> set[str]:
    """Return these, and those of whom one test of many proves something."""
    return families_of(item).union(*(mark.kwargs.get("of", ()) for mark in item.iter_markers("proves")))


def _processor_seconds() -> float:
    from ranks import processor_seconds

    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used) + processor_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Take the time of a family's short test; one of several families counts for each of them its share."""
    families = families_of(item)
    if not families or item.get_closest_marker("long"):
        return (yield)
    slow, began = yardstick.slowness(), (time.monotonic(), _processor_seconds())
    try:
        return (yield)
    finally:
        took = min(time.monotonic() - began[0], _processor_seconds() - began[1]) / slow
        for name in families:
            _spent[name] += took / len(families)


def over_budget() -> dict[str, float]:
    """Return the families that took more than they have, with their seconds."""
    return {name: took for name, took in _spent.items() if took > BUDGET}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker of pytest-xdist chose and took; a family's tests may have run in several."""
    global _choice
    chosen, why, spent = getattr(node, "workeroutput", {}).get("families", (None, "", {}))
    if chosen is not None:
        _choice = Choice(frozenset(chosen), frozenset(), why)
    for name, took in spent.items():
        _spent[name] += took


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail where a family took too long; where no family changed, nothing to run is right."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:  # a worker; the process that started it sums up
        chosen, why = (None, "") if _choice is None else (sorted(_choice.families), _choice.why)
        output["families"] = (chosen, why, dict(_spent))
        return
    if _choice is not None and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK
    if over_budget() and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was chosen, and what each family took."""
    if _choice is not None:
        names: Sequence[str] = sorted(_choice.families)
        terminalreporter.write_line(f"families ({_choice.why}): {', '.join(names) or 'none'}")
    if _spent:
        listing = ", ".join(f"{name} {took:.1f}" for name, took in sorted(_spent.items(), key=lambda one: -one[1]))
        terminalreporter.write_line(f"seconds of each family's short tests: {listing}")
    for name, took in over_budget().items():
        terminalreporter.write_line(
            f"ERROR: the short tests of family {name} took {took:.0f} s, more than {BUDGET:.0f}: mark some of them long"
        )
