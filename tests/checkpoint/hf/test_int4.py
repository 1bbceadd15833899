"""Int4 exports: the language model in GPTQ's or AWQ's layout, read back, at the loss of what they were made of."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_cases import load
from int4_layouts import dequantised
from PIL import Image
from safetensors.torch import save_file
from test_home_in_transformers import _without_torchvision, convert, exported, made  # noqa: F401 - a fixture
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoRoundConfig

from megavlm.cli import main

GROUP = 32
"""Divides the widths of the small models, as 128 divides those of published ones."""
BOUND = 0.05
"""By which the loss of the 4-bit model may differ from that in bf16, in nats a token."""


def data(directory: Path, records: int = 8) -> Path:
    """Write records with pictures of many sizes, before, between and behind text, and one without."""
    directory.mkdir()
    made_of = []
    for i in range(records):
        pixels = np.random.default_rng(i).integers(0, 255, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40 + 9 * i, 90 - 4 * i)).save(directory / f"{i}.png")
        asked = f"Picture 1: <img>{i}.png</img>\nHow many on the mat?" if i else "Who sat on the mat?"
        turns = [{"from": "user", "value": asked}, {"from": "assistant", "value": f"a cat sat on {i} mats"}]
        made_of.append({"id": str(i), "conversations": turns})
    (directory / "records.json").write_text(json.dumps(made_of))
    return directory / "records.json"


def int4(home: Path, records: Path, layout: str, out: Path, *more: str) -> int:
    words = ["--hf", home, "--layout", layout, "--data", records, "--out", out, "--group-size", GROUP, "--samples", 6]
    return main(["convert", "int4", *map(str, words), *more])


def _home(family: str, tmp_path: Path) -> Path:
    convert("hf-to-megatron", "--hf", made(family, tmp_path / "hf"), "--out", tmp_path / "m")
    return exported(tmp_path / "m", tmp_path / "home", trained=True)


def _inputs(home: Path) -> dict[str, Tensor]:
    processor = AutoProcessor.from_pretrained(home)
    pixels = np.random.default_rng(50).integers(0, 255, (44, 120, 3), dtype=np.uint8)
    content = [{"type": "image", "image": Image.open(io.BytesIO(_png(pixels)))}, {"type": "text", "text": "How many?"}]
    talk = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}]
    return dict(processor.apply_chat_template(talk, tokenize=True, return_dict=True, return_tensors="pt"))


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@torch.no_grad()
def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    taken = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return model.eval()(**taken).logits[0].float()


def _loss(logits: Tensor, inputs: dict[str, Tensor]) -> float:
    return float(torch.nn.functional.cross_entropy(logits[:-1], inputs["input_ids"][0, 1:]))


def _check_files(home: Path, out: Path) -> None:
    """All that is no linear layer of the language model is as it was."""
    for path in home.iterdir():
        if path.suffix != ".safetensors" and path.name != "config.json":
            assert (out / path.name).read_bytes() == path.read_bytes()
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    assert config == json.loads((home / "config.json").read_text())
    before, after = load(home), load(out)
    stems = {name.removesuffix(".qweight") for name in after if name.endswith(".qweight")}
    packed = {name for name in after if name.rpartition(".")[0] in stems}
    gone = {f"{stem}.weight" for stem in stems}
    assert set(before) - gone == {name for name in after if name not in packed or name in before}
    for name in set(before) - gone:
        assert before[name].dtype == after[name].dtype
        if ".layers." not in name or "language" not in name:
            assert torch.equal(before[name], after[name]), name
    linear = {f"self_attn.{one}_proj" for one in "qkvo"} | {f"mlp.{one}_proj" for one in ("gate", "up", "down")}
    assert {".".join(stem.split(".")[-2:]) for stem in stems} == linear


def check(home: Path, out: Path, layout: str) -> None:
    """Hold an export against what it was made of."""
    _check_files(home, out)
    inputs = _inputs(home)
    plain = out.with_name(f"{out.name}-plain")  # the same model, its weights turned back
    plain.mkdir()
    save_file(dequantised(load(out), layout, GROUP), plain / "model.safetensors", {"format": "pt"})
    (plain / "config.json").write_bytes((home / "config.json").read_bytes())
    bf16 = _logits(AutoModelForImageTextToText.from_pretrained(home, dtype=torch.bfloat16), inputs)
    turned = _logits(AutoModelForImageTextToText.from_pretrained(plain, dtype=torch.float32), inputs)
    assert not torch.equal(bf16, turned)
    difference = abs(_loss(turned, inputs) - _loss(bf16, inputs))
    # The losses of a model that knows nothing are much the same whatever it answers; its answers are not.
    divergence = float(torch.nn.functional.kl_div(turned.log_softmax(-1), bf16.softmax(-1), reduction="batchmean"))
    assert difference < BOUND and divergence < BOUND, (difference, divergence)
    if layout == "gptq":  # AWQ's layout is read by gptqmodel's kernels there, which are not here
        theirs, info = AutoModelForImageTextToText.from_pretrained(
            out, quantization_config=AutoRoundConfig(), dtype=torch.float32, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["mismatched_keys"]
        assert {name.rpartition(".")[2] for name in info["unexpected_keys"]} <= {"g_idx"}
        torch.testing.assert_close(_logits(theirs, inputs), turned, atol=0.02, rtol=0)  # it computes in fp16


@pytest.mark.long
@pytest.mark.family("llava")
@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_of_llava(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    home, steps = _home("llava", tmp_path), ["--iterations", "4"] if layout == "gptq" else []
    assert int4(home, data(tmp_path / "data"), layout, tmp_path / "out", *steps) == 0
    check(home, tmp_path / "out", layout)
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (found["quant_method"], found["bits"], found["group_size"]) == (layout, 4, GROUP)
    if layout == "gptq":
        assert found["sym"] is True and found["desc_act"] is False
        assert "-:.*\\bvision_tower\\b.*" in found["dynamic"]
        assert int4(tmp_path / "out", tmp_path / "nothing", layout, tmp_path / "again") == 2  # already of 4 bits
    else:
        assert found["zero_point"] is True and found["version"] == "gemm"
        assert {"vision_tower", "multi_modal_projector", "lm_head"} <= set(found["modules_to_not_convert"])
    assert not list(tmp_path.glob(".out*"))


def of_no_class(home: Path, path: Path) -> Path:
    """Write a directory of a kind that Transformers has no class for."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llava_of_mine"}))
    (path / "model.safetensors").write_bytes((home / "model.safetensors").read_bytes())
    return path


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded, in a line."""
    home, out = made("llava", tmp_path / "hf"), tmp_path / "out"
    records = data(tmp_path / "data")
    capsys.readouterr()

    def told(*words: str, hf: Path = home, layout: str = "gptq") -> str:
        assert int4(hf, records, layout, out, *words) == 2
        text = capsys.readouterr().err
        assert text.startswith("megavlm: error: ") and len(text.splitlines()) == 1
        return text

    assert "--iterations: goes with --layout gptq" in told("--iterations", "3", layout="awq")
    assert "--iterations must be at least 0" in told("--iterations", "-1")
    assert "--samples must be at least 1" in told("--samples", "0")
    monkeypatch.setitem(sys.modules, "auto_round", None)
    assert "convert int4 needs auto-round: pip install 'megavlm[int4]'" in told()
    text = told(hf=of_no_class(home, tmp_path / "unknown"))
    assert "has no class of its own that loads it, and code of the checkpoint is not run" in text
    tree = json.loads((home / "config.json").read_text())
    (home / "config.json").write_text(json.dumps(tree | {"quantization_config": {"quant_method": "awq"}}))
    assert "quantization_config says awq; int4 takes weights that are not quantised" in told()
    out.mkdir()
    (out / "mine").touch()
    assert "exists already" in told()
    assert list(out.iterdir()) == [out / "mine"]
