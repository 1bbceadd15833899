"""The converters' benchmark runs, in small: its rows are there, every bit comes back, and nothing is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "convert_14b.py"


@pytest.mark.long
@pytest.mark.slow
def test_tiny_run(tmp_path: Path) -> None:
    out, work = tmp_path / "result.json", tmp_path / "work"
    work.mkdir()
    options = ["--tiny", "--keep-caches", "--shard-size=0.002", f"--work={work}", f"--out={out}"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert "| way | what | seconds |" in done.stdout and "too small" not in done.stdout
    assert done.stdout.count("| converter, --no-verify |") == done.stdout.count("| converter, verified ") == 2
    assert result["identical_tensors"] == 61 and result["same_config"]
    for way in ("hf_to_megatron", "megatron_to_hf"):
        assert result["bytes"][way] >= 2 * result["parameters"]
        assert all(result[way][name]["anonymous"] > 10 << 20 for name in ("not verified", "verified"))
    assert not list(work.iterdir())


@pytest.mark.long
@pytest.mark.slow
def test_tiny_run_of_a_family(tmp_path: Path) -> None:
    options = ["--keep-caches", f"--work={tmp_path}", "--set=model.language.vocab_size=2048"]
    options += [f"--set=model.{key}" for key in ("language.num_layers=1", "vision.num_layers=1")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "convert_family.py"), *options],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "internvl3_8b/sft as internvl, 1 + 1 layers" in done.stdout
    assert "bit-identical, and config.json is the same" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_small_disk_gets_the_largest_model_that_fits(benchmark_module: object) -> None:
    script = benchmark_module
    full = script.FULL
    assert script.size_bytes(full) == 2 * (14_167_290_880 + 1_842_770_688 + 142_264_320)
    assert script.fitting(full, 10**11) == full
    free = 40_000_000_000
    less = script.fitting(full, free)
    more = script.dataclasses.replace(full, layers=less.layers + 1, vision_layers=less.vision_layers + 1)
    assert 2 * script.size_bytes(less) + script.SPARE_BYTES <= free < 2 * script.size_bytes(more) + script.SPARE_BYTES
    with pytest.raises(SystemExit, match="not even one layer"):
        script.fitting(full, 10**9)


def test_a_changed_bit_is_found(benchmark_module: object, tmp_path: Path) -> None:
    script = benchmark_module
    weights = script.Weights(script.shapes(script.TINY))
    weights.write(tmp_path, 10**9)
    assert weights.check(tmp_path) == 61
    (file,) = tmp_path.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    with pytest.raises(SystemExit, match="other bits"):
        weights.check(tmp_path)


@pytest.fixture(scope="module")
def benchmark_module() -> object:
    import importlib.util

    spec = importlib.util.spec_from_file_location("convert_14b", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["convert_14b"] = module
    spec.loader.exec_module(module)
    return module
