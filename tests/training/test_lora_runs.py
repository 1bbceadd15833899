"""``megavlm train`` with adapters as its users run it: a base, adapters, resume, answers, and refusals."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from benchmark_files import MAKERS
from ranks import megavlm
from run_data import RunData
from serving import serving

from megavlm.checkpoint.hf.inspect import inspect_checkpoint
from megavlm.checkpoint.slots import Slot
from megavlm.checkpoint.stream import CheckpointReader
from megavlm.cli import main

TP2_PP2 = (
    "parallel.tensor_model_parallel_size=2",
    "parallel.pipeline_model_parallel_size=2",
    "parallel.sequence_parallel=true",
)
ALONE = (
    "parallel.tensor_model_parallel_size=1",
    "parallel.pipeline_model_parallel_size=1",
    "parallel.sequence_parallel=false",
)
LORA = (
    "lora.rank=4", "lora.targets=[c_attn,c_proj,w1,w2]", "lora.dropout=0.1", "modules.vision.freeze=true",
    "training.train_steps=4", "checkpoint.save_interval=2", "checkpoint.keep=9",
)  # fmt: skip


def train(data: RunData, output: Path, *overrides: str, ranks: int = 1) -> str:
    return megavlm(data.words(output, *overrides), world=ranks).output


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> dict[int, float]:
    found: dict[int, float] = {}
    for line in lines(output):
        if "loss" in line:
            assert found.get(line["step"], line["loss"]) == line["loss"]  # a step that ran twice is the same
            found[line["step"]] = line["loss"]
    return found


@pytest.fixture(scope="module")
def base(run_data: RunData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("base")
    train(run_data, output, "training.train_steps=3")
    return output


@pytest.fixture(scope="module")
def adapted(run_data: RunData, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("adapted") / "run"
    train(run_data, output, *LORA, *TP2_PP2, f"checkpoint.load={base}", ranks=4)
    return output


def test_resume_is_exact(run_data: RunData, base: Path, adapted: Path, tmp_path: Path) -> None:
    """With dropout; and the base has been moved, which checkpoint.load says."""
    shutil.copytree(adapted, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    moved = base.rename(base.with_name("moved"))
    try:
        text = train(run_data, tmp_path / "run", *LORA, *TP2_PP2, f"checkpoint.load={moved}", ranks=4)
    finally:
        moved.rename(base)
    assert "at step 2" in text and sorted(losses(tmp_path / "run")) == [1, 2, 3, 4]


@pytest.mark.parametrize("quantize", ["null", "nf4"])
def test_bf16_resumes_exactly(quantize: str, run_data: RunData, base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = run_data.words(
        run, *LORA, f"checkpoint.load={base}", "training.precision=bf16", f"lora.quantize={quantize}"
    )
    assert main(words) == 0
    state = CheckpointReader(run / "checkpoints" / "step-00000004").tensors()
    shutil.move(run / "checkpoints" / "step-00000004", tmp_path / "uninterrupted")
    assert main(words) == 0
    assert sorted(losses(run)) == [1, 2, 3, 4]
    assert [line["step"] for line in lines(run) if "loss" in line] == [1, 2, 3, 4]
    assert (run / "metrics.undone.jsonl").is_file()  # the first 3 and 4
    left, right = (CheckpointReader(path) for path in (tmp_path / "uninterrupted", run / "checkpoints/step-00000004"))
    for key, entry in state.items():
        slot = Slot(key, tuple(entry.size))
        assert torch.equal(left.read(slot), right.read(slot)), key


def test_a_checkpoint_holds_what_learns(base: Path, adapted: Path) -> None:
    step = adapted / "checkpoints" / "step-00000004"
    record = json.loads((step / "adapter.json").read_text())
    assert record["base"] == str(base / "checkpoints" / "step-00000003") and len(record["weights_sample_sha256"]) == 64
    assert inspect_checkpoint(step)["adapters for"] == record["base"]
    keys = {key for key in CheckpointReader(step).tensors() if not key.startswith("optimizer.")}
    learns = {key for key in keys if key.startswith("connector.") or key.endswith((".lora_a", ".lora_b"))}
    assert keys == learns and len([key for key in keys if ".lora_" in key]) == 8


@pytest.fixture(scope="module")
def merged(adapted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "whole"
    assert main(["convert", "merge", "--megatron", str(adapted), "--out", str(out)]) == 0
    return out


def predictions(checkpoint: Path, out: Path, *words: str, ranks: int = 1) -> list[float]:
    """Ask with ``megavlm eval`` which option is the likeliest; return the losses of all of them.

    What so little training makes of open questions are control tokens, and an empty answer.
    """
    all_words = ["eval", checkpoint, *words, "--benchmark=mmbench", f"--out={out}", "--panel-samples=0"]
    all_words += MAKERS["mmbench"](out.with_name(f"{out.name}-data"))
    if ranks == 1:
        assert main([str(word) for word in all_words]) == 0
    else:
        megavlm(all_words, world=ranks)
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    return [loss for row in rows for loss in row["losses"]]


def test_adapters_answer_as_the_merged_weights(base: Path, adapted: Path, merged: Path, tmp_path: Path) -> None:
    expected = pytest.approx(predictions(merged, tmp_path / "merged", *ALONE), abs=1e-4)
    assert predictions(base, tmp_path / "base", *ALONE) != expected
    assert predictions(adapted, tmp_path / "alone", *ALONE) == expected
    assert predictions(adapted, tmp_path / "spread", *TP2_PP2, ranks=4) == expected


def test_commands_answer_with_adapters(
    run_data: RunData,
    adapted: Path,
    merged: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """generate, chat and serve."""
    picture = next(path for path in sorted(run_data.images.rglob("*")) if path.suffix in (".png", ".jpg"))
    question, said = "What is this?", {}
    for checkpoint in (adapted, merged):
        words = [str(checkpoint), *ALONE, "--image", str(picture), "--max-new-tokens=8"]
        assert main(["generate", *words, "--prompt", question]) == 0
        text = capsys.readouterr().out.strip()
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{question}\n"))
        assert main(["chat", *words, "--out", str(tmp_path)]) == 0
        assert text and text in capsys.readouterr().out
        said[checkpoint] = text
    assert said[adapted] == said[merged]
    with serving(adapted, picture, tmp_path / "log", *ALONE) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=600)
        url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
        content: Any = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        answer = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": content}], max_tokens=8
        )
    assert (answer.choices[0].message.content or "").strip() == said[adapted]


REFUSED = {
    "another rank": (["lora.rank=8"], "lora.rank: 8, but"),
    "another target": (["lora.targets=[c_attn]"], "lora.targets: ['c_attn'], but"),
    "no adapters": (["lora.rank=null", "lora.targets=[]", "lora.dropout=0"], "lora.rank: null, but"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_adapters_are_refused(
    case: str, run_data: RunData, base: Path, adapted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = REFUSED[case]
    assert main(run_data.words(adapted, *LORA, f"checkpoint.load={base}", *words)) == 2
    assert message in capsys.readouterr().err


def test_answers_in_4_bits_need_their_library(
    adapted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = ["generate", str(adapted), *ALONE, "--prompt", "What?", "lora.quantize=nf4"]
    assert main(words) == 2
    assert_one_line(capsys, "lora.quantize: bitsandbytes is not installed; pip install 'megavlm[qlora]'")


def moved(base: Path, to: Path) -> Path:
    shutil.copytree(base, to, ignore=shutil.ignore_patterns("metrics*", "events*"))
    return to


def test_the_base_may_move(
    base: Path, adapted: Path, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the adapters, or alone, and then its user says where it is now; another one is refused before a start."""
    step = "checkpoints/step-00000004"
    shutil.copytree(adapted / step, tmp_path / "a" / "run" / step)
    record = tmp_path / "a" / "run" / step / "adapter.json"
    entry = json.loads(record.read_text())
    entry["base"] = str(tmp_path / "gone" / "step-00000003")
    entry["relative"] = "../../../base/checkpoints/step-00000003"
    record.write_text(json.dumps(entry))
    words = ["convert", "merge", "--megatron", str(tmp_path / "a" / "run")]

    together = moved(base, tmp_path / "a" / "base")
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    alone = together.rename(tmp_path / "elsewhere")
    assert main([*words, "--out", str(tmp_path / "two")]) == 2
    assert_one_line(capsys, "gone/step-00000003, which is not there; name the checkpoint that they were trained on")
    assert main([*words, "--out", str(tmp_path / "two"), "--base", str(alone)]) == 0
    for out in ("one", "two"):
        for part in merged.glob("*.distcp"):
            assert (tmp_path / out / part.name).read_bytes() == part.read_bytes()

    ask = ["generate", str(tmp_path / "a" / "run"), *ALONE, "--prompt", "What?", "--max-new-tokens=2"]
    capsys.readouterr()
    assert main([*ask, f"checkpoint.load={alone}"]) == 0
    capsys.readouterr()
    assert main([*ask, f"checkpoint.load={tmp_path / 'nowhere'}"]) == 2
    assert_one_line(capsys, "which is not there")
    assert main([*ask, f"checkpoint.load={tmp_path / 'one'}"]) == 2  # whole weights, but others
    assert_one_line(capsys, f"its adapters are for other weights than {tmp_path / 'one'} has now")


def assert_one_line(capsys: pytest.CaptureFixture[str], text: str) -> None:
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("megavlm: error: ") and text in error[0], error
