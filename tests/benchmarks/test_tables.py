"""benchmarks/README.md: tables name their commit, and what the machine does not change is what the command gives."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from ranks import script

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
SECTIONS = {part.splitlines()[0]: part for part in README.split("\n## ")[1:]}
MEASURED = [name for name, text in SECTIONS.items() if "\n|---" in text]


def rows(section: str) -> list[list[str]]:
    """The cells of all rows of a section's tables."""
    lines = [line for line in SECTIONS[section].splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def row(section: str, *first: str) -> list[str]:
    """The only row that begins with ``first``, without these cells."""
    (found,) = [one[len(first) :] for one in rows(section) if tuple(one[: len(first)]) == first]
    return found


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> object:
    """Import a script of benchmarks/."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.mark.parametrize("section", MEASURED)
def test_it_names_its_commit(section: str) -> None:
    commits = re.findall(r"at\s+commit\s+`([0-9a-f]{7,40})`", SECTIONS[section])
    assert commits, "say 'at commit `1234567`': the code whose figures these are"
    git = ["git", "-C", str(ROOT)]
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return
    shallow = subprocess.run([*git, "rev-parse", "--is-shallow-repository"], capture_output=True, text=True, check=True)
    if shallow.stdout.strip() == "false":
        for commit in commits:
            done = subprocess.run([*git, "merge-base", "--is-ancestor", commit, "HEAD"], check=False)
            assert done.returncode == 0, f"{commit} is no commit of this history"


def test_expert_balance() -> None:
    """The table says what the file does: that loads drift apart, and that loss and biases keep them even."""
    ways = json.loads((ROOT / "benchmarks" / "expert_balance.json").read_text())["ways"]
    for name, one in ways.items():
        figures = [str(one[part][key]) for key in ("loss", "largest", "smallest") for part in ("first", "last")]
        assert row("expert_balance", name) == figures
        assert one["last"]["loss"] < one["first"]["loss"] / 2
    apart, even = ("softmax, nothing", "sigmoid, nothing"), ("softmax, loss 0.1", "sigmoid, biases 0.01")
    assert min(ways[name]["last"]["largest"] for name in apart) > 2.5
    assert max(ways[name]["last"]["largest"] for name in even) < 1.2


@pytest.mark.long
def test_expert_balance_runs(module: type[ModuleType]) -> None:
    bench = module("expert_balance")
    found = {
        name: bench.train(bench.WAYS[name], 2 * bench.SPAN) for name in ("sigmoid, nothing", "sigmoid, biases 0.01")
    }
    assert all(one["last"]["loss"] < one["first"]["loss"] for one in found.values())
    apart, even = (one["last"]["largest"] for one in found.values())
    assert even < 1.2 < apart


def test_data_path(module: type[ModuleType], tmp_path: Path) -> None:
    bench = module("data_path")
    mix = bench.make_mix(tmp_path, bench.PICTURES)
    mean = sum(mix.lengths) / len(mix.lengths)
    said = f"{len(mix.lengths)} quickstart samples of {mean:.0f} tokens on average, packs of {bench.SEQUENCE_LENGTH}, "
    assert said + f"buffers of {bench.BUFFER};" in " ".join(SECTIONS["data_path"].split())
    packed = bench.measure_padding(mix.lengths, samples=20 * bench.PICTURES)
    reader = bench.measure_reader(mix, 0, bench.PICTURES // 5)
    tiles = bench.measure_reader(mix, 0, bench.PICTURES // 5, bench.SMALL_TILES)
    # A machine's speeds, which nobody looks at here.
    rates = {"images_per_s": 1.0, "views_per_s": 1.0, "squares_per_s": 1.0}
    decoder = {"device": "cpu", "64": rates, "448": rates, "tiles": rates}
    result = {
        "machine": {**bench.machine(), "packages": {}}, "samples": {"count": 0, "mean_tokens": 0.0}, "command": "",
        "seconds": 0.0, "reader": {"0": reader, "1": reader}, "reader_of_tiles": tiles, "padding": packed,
        "decoders": dict.fromkeys(("dali", "simplejpeg", "pil"), decoder),
    }  # fmt: skip
    printed = [[cell.strip() for cell in line.strip("|").split("|")] for line in bench.table(result).splitlines()
               if line.startswith(("| reader", "| decoder", "| tiles", "| padding"))]  # fmt: skip
    written = rows("data_path")[1:]
    told = "run benchmarks/data_path.py on a quiet machine and write what it prints into benchmarks/README.md"
    assert [one[:2] for one in written] == [one[:2] for one in printed], told
    # The last figure of a reader's row, and the only one of a packer's, are padding.
    for (kind, how, theirs), (*_, ours) in zip(written, printed, strict=True):
        if kind in ("reader", "padding"):
            assert theirs.split(", ")[-1] == ours.split(", ")[-1], how


def test_vs_transformers(module: type[ModuleType], tmp_path: Path) -> None:
    """The padding of the batches that the table's 4 rounds of 2 steps took, after one to warm up."""
    mixes, worker = module("mixes"), module("vs_worker")
    side = object.__new__(worker.Transformers)  # without its models
    side.pack_length = 2048
    names = {"random batches": "random", "no padding": "random", "grouped by length": "grouped"}
    expected = [one for one in rows("vs_transformers") if one[0] in mixes.DESCRIPTIONS]
    assert len(expected) == 5
    for mix in mixes.DESCRIPTIONS:
        samples = mixes.make(mix, tmp_path, 800)
        for _, against, padding, *_ in (one for one in expected if one[0] == mix):
            taken = [work for _, work in side.batches(samples, names[against])[1:9]]
            share = 1 - sum(work.tokens for work in taken) / sum(work.processed for work in taken)
            assert padding == f"{share:.1%}", (mix, against)


def test_pipeline_balance(module: type[ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the first case, which is computed as all others are."""
    bench = module("pipeline_balance")
    cases = bench.CASES
    name, case = next(iter(cases.items()))
    monkeypatch.setattr(bench, "CASES", {name: dataclasses.replace(case, mixes=case.mixes[:1])})
    (measured,) = bench.measure(8)["cases"]
    lines = SECTIONS["pipeline_balance"].splitlines()
    title = f"| **{name}**: TP 4 x PP 2 x DP 16, 8 micro-batches | | | | | | | |"
    assert lines[lines.index(title) + 1] == bench._row(measured)
    # The others are there, in the command's order.
    found = [one[0] for one in rows("pipeline_balance")[1:]]
    expected = [cell for name, case in cases.items() for cell in (f"**{name}**", *case.mixes)]
    assert [one.partition(":")[0] for one in found] == expected


def test_convert_14b(module: type[ModuleType]) -> None:
    bench = module("convert_14b")
    shapes = bench.shapes(bench.FULL)
    text = " ".join(SECTIONS["convert_14b"].split())
    assert f"{bench.size_bytes(bench.FULL) / 2e9:.2f} G random bf16 parameters" in text
    assert f"{bench.size_bytes(bench.FULL) / 1e9:.2f} GB, {len(shapes)} tensors in " in text
    assert row("convert_14b", "both", "there and back")[0].startswith(f"all {len(shapes)} tensors bit-identical")


def test_step_timing() -> None:
    """The moments of a step, of every layout."""
    benchmark = ROOT / "benchmarks" / "step_timing.py"
    for layout, world, words in (("1 process", 1, []), ("TP 2", 2, ["--tensor=2"]), ("PP 2", 2, ["--pipeline=2"])):
        printed = script(benchmark, "--pairs=1", *words, world=world).stdout
        (line,) = [line for line in printed.splitlines() if line.startswith("| TP ")]
        assert row("step_timing", layout)[4] == line.strip("|").split("|")[5].strip(), layout


def test_lora(module: type[ModuleType]) -> None:
    """What learns and what it takes, from the model's shapes; and what the planner says of Qwen-VL."""
    from megavlm.planning.layout import layout_of
    from megavlm.planning.parameters import chunk_parameters

    bench = module("lora")
    for mode in bench.MODES:
        recipe = bench.make_recipe(mode, 768, 12)
        layout = layout_of(recipe, 1)
        found = [p for p in chunk_parameters(recipe, layout, layout.chunks[0]) if p.module == "language"]
        learning = sum(p.elements for p in found if p.learns)
        state = [f"{learning / 1e6:.2f} M", f"{4 * learning / 2**20:.1f} MiB", f"{8 * learning / 2**20:.1f} MiB"]
        learns, weights, gradients, optimizer, *_ = row("lora", mode)
        assert [learns, gradients, optimizer] == state
        if mode != "qlora":
            assert weights == f"{4 * sum(p.elements for p in found) / 2**20:.1f} MiB"
    for kind in bench.QWEN_VL:
        for tokens, theirs in bench.A100[kind].items():
            both = [
                bench.predicted(bench.qwen_vl_recipe(kind, tokens, tiny=False, recompute=recompute))
                for recompute in ("selective", "full")
            ]
            cells = [f"{one['predicted'] / 1e9:.1f} / {one['predicted_seconds']:.2f}" for one in both]
            assert row("lora", kind, str(tokens)) == [*cells, f"{theirs[0]} / {theirs[1]}"]
