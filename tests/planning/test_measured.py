"""A plan with rates that a device was measured to have."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_recipe

from megavlm.cli import WRONG_INPUT, main
from megavlm.config.errors import RecipeError
from megavlm.config.schema import Recipe
from megavlm.planning import timing
from megavlm.planning.gpus import choose_gpu, find_gpu
from megavlm.planning.layout import layout_of
from megavlm.planning.measured import Rates, read_rates
from megavlm.planning.search import evaluate
from megavlm.planning.timing import Timer
from megavlm.planning.workload import assume_workload

H100 = find_gpu("h100-80g")
DEVICE = "4 x NVIDIA H100 80GB HBM3, 79 GiB, sm_90"
TREE: dict[str, Any] = {
    "machine": {"device": DEVICE},
    "rates": {
        "matmul": [[8192, 8192, 8192, 700.0], [2048, 15360, 5120, 600.0], [512, 4096, 4096, 300.0]],
        "attention": [[2048, 512, 40, 128, True, 250.0], [5125, 1025, 16, 104, False, 200.0]],
        "copy": [[2**20, 4000.0], [2**28, 2600.0], [2**30, 2500.0]],
        "host": [[2**30, 5.0, 50.0, 5.0, 50.0]],
    },
}


def written(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({**TREE, **changes}))
    return path


def recipe_of(**branches: Any) -> Recipe:
    return tiny_recipe(
        model={"preset": "qwen_vl_7b", "vision": {}, "connector": {}, "language": {}},
        data={"sequence_length": 2048},
        training={"precision": "bf16", "global_batch_size": 64, "train_steps": 10},
        **branches,
    )


def even(product: float, attention: float, copy: float) -> Rates:
    """Return the rates of a device that is equally fast at all sizes."""
    return Rates(
        "x", 80.0, ((64, 64, 64, product), (8192, 8192, 8192, product)),
        ((64, 32, 2, 64, 1, attention), (8192, 8192, 32, 128, 0, attention)), ((1, copy), (2**30, copy)),
    )  # fmt: skip


LORA = {"rank": 16, "targets": ("c_attn", "attn.c_proj", "w1", "w2"), "train_head": True}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tp4": {"parallel": {"tensor_model_parallel_size": 4, "sequence_parallel": True}},
    "selective": {"parallel": {"recompute_granularity": "selective"}},
    "lora": {"lora": LORA, "modules": {"vision": {"freeze": True}}},
}


@pytest.mark.parametrize("name", CASES)
def test_a_device_that_is_even_is_timed_by_its_efficiencies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One share of the peak at all sizes, assumed or measured, is the same step."""
    monkeypatch.setattr(timing, "_TILE", 0)  # what was measured of attention has its tiles in it
    recipe = recipe_of(**CASES[name])
    workload, layout = assume_workload(recipe), layout_of(recipe, 8)
    share = dataclasses.replace(H100.efficiency, gemm=0.6, tower=0.6, attention=0.4, memory=0.7)
    assumed = dataclasses.replace(H100, efficiency=share)
    rates = even(0.6 * H100.bf16_flops, 0.4 * H100.bf16_flops, 0.7 * H100.bandwidth)
    measured = dataclasses.replace(H100, rates=rates)
    one, other = (Timer(recipe, layout, gpu, workload).step() for gpu in (assumed, measured))
    for field in dataclasses.fields(one):
        assert getattr(other, field.name) == pytest.approx(getattr(one, field.name), rel=1e-9), field.name
    fast = even(1.2 * H100.bf16_flops, 0.8 * H100.bf16_flops, 1.4 * H100.bandwidth)
    twice = Timer(recipe, layout, dataclasses.replace(H100, rates=fast), workload).step()
    assert twice.stage_seconds[0] < 0.75 * other.stage_seconds[0]


def test_rates_between_what_was_measured(tmp_path: Path) -> None:
    rates = read_rates(written(tmp_path / "gpu.json"))
    assert (rates.device, rates.memory_gib) == ("NVIDIA H100 80GB HBM3", 79)
    for m, n, k, rate in TREE["rates"]["matmul"]:
        # The same sizes are the forward product's and those of both gradients.
        assert all(rates.product(*sizes) == rate * 1e12 for sizes in itertools.permutations((m, n, k)))
    assert 300e12 < rates.product(1024, 4096, 4096) < 700e12
    assert rates.product(700, 4096, 4096) < rates.product(2048, 12000, 5120)
    assert rates.attend(512, 40, 128, causal=True) == 250e12
    assert rates.attend(1025, 16, 104, causal=False) == 200e12
    assert 200e12 < rates.attend(512, 40, 128, causal=False) < 250e12
    assert rates.stream(2**28) == 2600e9 and 2500e9 < rates.stream(2**29) < 4000e9
    assert math.isfinite(rates.product(0, 1, 1))  # a pack without images


def test_what_gpu_check_writes_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real job, small, on the CPU: the schema is one."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from gpu_rates import rates as job

    found = read_rates(written(tmp_path / "gpu.json", rates=job({"small": True})))
    assert len(found.matmul[0]) == 4 and len(found.attention[0]) == 6 and len(found.copy[0]) == 2
    assert "gpu_rates" in sys.modules


def test_recorded_rates_can_be_planned_with() -> None:
    root = Path(__file__).parents[2] / "benchmarks"
    files = [path for path in root.glob("gpu*.json") if json.loads(path.read_text()).get("rates")]
    assert files
    for path in files:
        gpu = choose_gpu(None, rates=read_rates(path))
        recipe = recipe_of()
        ours, theirs = (evaluate(recipe, 1, one, assume_workload(recipe)) for one in (gpu, find_gpu(gpu.name)))
        assert ours.time.step == pytest.approx(theirs.time.step, rel=0.4), path


def with_rates(**changes: Any) -> dict[str, Any]:
    return {"rates": {**TREE["rates"], **changes}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": None}, "has no rates; run make gpu-check on the device"),
        ({"rates": {}}, "has no rates"),
        (with_rates(copy=[]), "has no rates.copy"),
        (with_rates(matmul=[[1, 2, 3]]), "rates.matmul.0 is [1, 2, 3], not 4 numbers above 0"),
        (with_rates(matmul=[[1, 2, 3, 4], [1, 2, 3, 0]]), "rates.matmul.1 is [1, 2, 3, 0]"),
        (with_rates(attention=[[1, 2, 3, 4, "yes", 5]]), "rates.attention.0 is"),
        (with_rates(copy=[[5, float("nan")]]), "rates.copy.0 is [5, NaN]"),
        ({"machine": {"device": "CPU (dry run)"}}, "is of a dry run on a CPU"),
    ],
)
def test_a_file_without_rates_is_one_line(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "gpu.json", **changes)
    assert main(["plan", "quickstart", "--gpus", "2", "--measured", str(path)]) == WRONG_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_which_gpu_was_measured(tmp_path: Path) -> None:
    known = read_rates(written(tmp_path / "a.json"))
    assert choose_gpu(None, rates=known).name == "h100-80g"
    assert choose_gpu("h200-141g", rates=known).memory_bytes == find_gpu("h200-141g").memory_bytes
    assert choose_gpu(None).name == "h100-80g" and choose_gpu(None).rates is None
    other = read_rates(written(tmp_path / "b.json", machine={"device": "1 x NVIDIA H100 PCIe, 80 GiB, sm_90"}))
    gpu = choose_gpu(None, rates=other)
    assert (gpu.name, gpu.bf16_flops, gpu.memory_bytes) == ("NVIDIA H100 PCIe", 756e12, 80 * 2**30)
    unknown = read_rates(written(tmp_path / "c.json", machine={"device": "1 x Some GPU"}))
    with pytest.raises(RecipeError, match="custom also needs --gpu-memory GIB"):
        choose_gpu(None, rates=unknown)
    assert evaluate(recipe_of(), 8, gpu, assume_workload(recipe_of())).time.step > 0


def test_the_page_says_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "qwen_vl_7b/sft", "--gpus", "8", "--measured", str(written(tmp_path / "gpu.json"))]
    assert main(words) == 0
    page = capsys.readouterr().out
    assert page.startswith("Predicted, not measured: 8 x h100-80g")
    assert "Products, attention and copies are as fast as measured on NVIDIA H100 80GB HBM3; links" in page
    assert main([*words, "--gpu", "a100-80g"]) == 0
    assert "HBM3, which is no a100-80g; links" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["gpu"]["rates"]["device"] == "NVIDIA H100 80GB HBM3" and report["launch"][0].startswith("torchrun")
