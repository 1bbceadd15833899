"""Qwen-VL in the layout of Qwen/Qwen-VL-Chat-Int4, against the plain reference and the published directory.

Published: https://huggingface.co/Qwen/Qwen-VL-Chat-Int4, ``config.json`` and ``model.safetensors.index.json``, read in
the copy x1ngzai/Qwen-VL-Chat-Int4 ``1cd721a2`` on GitHub.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qwen_reference
import torch
from family_cases import (
    CLIP_MEAN,
    CLIP_STD,
    CODEFUSE,
    QWEN_VL,
    codefuse_name,
    codefuse_published,
    load,
    qwen_config,
    visual_config,
    write,
)
from int4_layouts import dequantised
from PIL import Image
from qwen_reference import Sizes
from test_int4 import BOUND, GROUP, data, int4
from tokenizer_files import write_tiktoken
from torch import Tensor

from megavlm.checkpoint.hf import int4 as int4_module
from megavlm.checkpoint.hf import int4_qwen
from megavlm.checkpoint.hf.int4_qwen import QwenDirectory
from megavlm.config.errors import UserError
from megavlm.data.tokenizer import load_tokenizer

PUBLISHED = {
    "bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": False, "static_groups": False, "sym": True,
    "true_sequential": True, "model_name_or_path": None, "model_file_base_name": "model", "quant_method": "gptq",
}  # fmt: skip
LAYER = {
    *(f"{linear}.{part}" for linear in ("attn.c_attn", "attn.c_proj", "mlp.c_proj", "mlp.w1", "mlp.w2")
      for part in ("bias", "g_idx", "qweight", "qzeros", "scales")),
    "ln_1.weight", "ln_2.weight",
}  # fmt: skip
"""What a layer of the published index has."""


def directory(
    path: Path, dtype: torch.dtype = torch.bfloat16, kind: str = "qwen_vl", changed: Mapping[str, Tensor] | None = None
) -> tuple[Path, Sizes]:
    """Write a small Qwen-VL (or CodeFuse-VLM, or Qwen) with a tokenizer, remote code, and a buffer of older ones."""
    path.parent.mkdir(exist_ok=True)
    tokens = path.parent / "tokens"
    tokens.mkdir()
    tokenizer = load_tokenizer(write_tiktoken(tokens))
    s = dataclasses.replace(QWEN_VL, layers=2, ffn=96, vocab=tokenizer.vocab_size, image_token=tokenizer.imgpad_id)
    state = {name: value.to(dtype) for name, value in qwen_reference.random_state(s, 1).items()}
    changed = changed or {}
    state |= changed
    for name in state:  # as its initializer_range, and the models of Transformers in the other tests, have it
        if ".visual." not in name and "ln_" not in name and name not in changed:
            state[name] *= 0.2
    state["transformer.rotary_emb.inv_freq"] = torch.ones(8)
    config = {**qwen_config(s), "visual": {**visual_config(s), "n_queries": s.queries}, "bf16": True}
    files = {"modeling_qwen.py": "raise SystemExit('remote code must not run')\n"}
    if kind == "codefuse_vlm":
        s = dataclasses.replace(s, queries=CODEFUSE.queries)  # which its code has fixed
        pool = qwen_reference.random_state(s, 1)
        state |= {name: pool[name].to(dtype) for name in pool if name.endswith(("pos_embed", "attn_pool.query"))}
        config |= {"model_type": "llava_qwen", "mm_projector_type": "cross_attn"}
        files["visual_config.json"] = json.dumps(config.pop("visual"))
    elif kind == "qwen":
        del config["visual"]
        state = {name: value for name, value in state.items() if ".visual." not in name}
    write(path, {codefuse_name(name) if kind != "qwen_vl" else name: state[name] for name in state}, config, **files)
    (tokens / "qwen.tiktoken").rename(path / "qwen.tiktoken")
    return path, s


def features(state: dict[str, Tensor], s: Sizes, picture: Path) -> Tensor:
    """Return what the reference sees of a picture, squashed as the published code does."""
    pixels = Image.open(picture).convert("RGB").resize((s.image, s.image), Image.Resampling.BICUBIC)
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    normal = (torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255 - mean) / std
    return qwen_reference.encode(state, s, normal[None])


@pytest.mark.parametrize("kind", ["qwen_vl", "codefuse_vlm"])
def test_what_is_quantised_computes_what_qwen_vl_computes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The class that calibration goes through, with features made here, gives the reference's logits."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    home, s = directory(tmp_path / "hf", torch.float32, kind)
    records, state = data(tmp_path / "data", 3), load(home)
    names = {codefuse_name(name): name for name in qwen_reference.shapes(s)} if kind == "codefuse_vlm" else {}
    state = {names.get(name, name): value for name, value in state.items()}
    qwen = QwenDirectory.open(home, 512)
    samples = qwen.samples(records, None, 8, 0)
    assert [("features" in one, "input_ids" in one) for one in samples].count((True, True)) == 2 and len(samples) == 3
    model = qwen.language_model(torch.float32)
    seen = [features(state, s, tmp_path / "data" / f"{i}.png") for i in (1, 2)]
    pictured = 0
    for one in samples:
        ids = one["input_ids"][0]
        shown = torch.zeros(0, s.queries, s.hidden)
        if "features" in one:
            shown = min(seen, key=lambda f: float((f - one["features"]).abs().max()))
            torch.testing.assert_close(one["features"], shown, atol=2e-4, rtol=0)
            assert int((ids == s.image_token).sum()) == s.queries
            pictured += 1
        with torch.no_grad():
            logits = model(**one).logits[0]
        torch.testing.assert_close(logits, qwen_reference.logits(state, s, ids, shown), atol=2e-3, rtol=1e-4)
    assert pictured == 2


def test_of_a_language_model_alone_pictures_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level("INFO")
    home, s = directory(tmp_path / "hf", torch.float32, "qwen")
    qwen = QwenDirectory.open(home, 512)
    (one,) = qwen.samples(data(tmp_path / "data", 3), None, 8, 0)
    assert "left out: 2 with a picture, and this is a language model alone" in caplog.text
    ids = one["input_ids"][0]
    with torch.no_grad():
        logits = qwen.language_model(torch.float32)(**one).logits[0]
    expected = qwen_reference.logits(load(home), s, ids, torch.zeros(0, s.queries, s.hidden))
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-4)


@pytest.mark.long
@pytest.mark.family("qwen_vl")
@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_export(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    quantised: dict[str, Tensor] = {}
    run = int4_module._run

    def remembered(*arguments: Any) -> Any:
        found = run(*arguments)
        quantised.update({name: found.get(name).clone() for name in found.tensors})
        return found

    monkeypatch.setattr(int4_module, "_run", remembered)
    home, s = directory(tmp_path / "hf")
    out, steps = tmp_path / "out", ["--iterations", "4"] if layout == "gptq" else []
    assert int4(home, data(tmp_path / "data"), layout, out, *steps) == 0
    before, after = load(home), load(out)
    _check_files(home, out, layout)
    layers = [f"transformer.h.{i}." for i in range(s.layers)]
    own = (
        LAYER
        if layout == "gptq"
        else {one for one in LAYER if one.rpartition(".")[2] != "g_idx"}
        - {f"{one}.bias" for one in ("attn.c_proj", "mlp.c_proj", "mlp.w1", "mlp.w2")}
    )
    outside = {name for name in before if ".h." not in name and "inv_freq" not in name}
    assert after.keys() == outside | {at + one for at in layers for one in own}
    for name in outside:
        assert torch.equal(after[name], before[name].half()), name
    if layout == "gptq":
        assert all(not after[at + one].any() for at in layers for one in ("attn.c_proj.bias", "mlp.w1.bias"))
        assert all(torch.equal(after[at + "attn.c_attn.bias"], before[at + "attn.c_attn.bias"].half()) for at in layers)
    # What was written is what was quantised, q, k and v side by side.
    turned = {name: value.float() for name, value in dequantised(after, layout, GROUP).items()}
    qwen2 = dequantised(quantised, layout, GROUP)
    for i, at in enumerate(layers):
        there = f"model.layers.{i}."
        three = torch.cat([qwen2[f"{there}self_attn.{one}_proj.weight"] for one in "qkv"])
        assert torch.equal(turned[at + "attn.c_attn.weight"], three)
        assert torch.equal(turned[at + "mlp.w2.weight"], qwen2[there + "mlp.gate_proj.weight"])
        assert torch.equal(turned[at + "mlp.w1.weight"], qwen2[there + "mlp.up_proj.weight"])
        if layout == "gptq":
            near = (turned[at + "mlp.c_proj.weight"] - before[at + "mlp.c_proj.weight"].float()).abs()
            assert float(near.max()) < 0.02  # half a step is some 0.005
    _check_answers(before, turned, s, tmp_path / "data" / "3.png")


def _check_files(home: Path, out: Path, layout: str) -> None:
    config, came = (json.loads((one / "config.json").read_text()) for one in (out, home))
    told = config.pop("quantization_config")
    numbers = {"bf16": False, "fp16": True, "fp32": False, "torch_dtype": "float16"}
    assert config == came | numbers
    assert (out / "modeling_qwen.py").read_bytes() == (home / "modeling_qwen.py").read_bytes()
    assert (out / "qwen.tiktoken").is_file()
    if layout == "gptq":
        assert told == PUBLISHED | {"group_size": GROUP}
        file = json.loads((out / "quantize_config.json").read_text())
        assert file == {key: value for key, value in told.items() if key != "quant_method"}
    else:
        assert (told["quant_method"], told["version"], told["zero_point"]) == ("awq", "gemm", True)
        assert not (out / "quantize_config.json").exists()


def _check_answers(before: dict[str, Tensor], turned: dict[str, Tensor], s: Sizes, picture: Path) -> None:
    """The reference's loss and answers with the weights turned back, beside those with the directory's own."""
    state = {name: value.float() for name, value in before.items()}
    ids = torch.randint(0, 256, (48,), generator=torch.Generator().manual_seed(5))
    ids[4 : 4 + s.queries] = s.image_token
    shown = features(state, s, picture)
    plain, packed = (qwen_reference.logits(one, s, ids, shown) for one in (state, turned))
    assert not torch.equal(plain, packed)
    loss = [float(torch.nn.functional.cross_entropy(one[:-1], ids[1:])) for one in (plain, packed)]
    divergence = torch.nn.functional.kl_div(packed.log_softmax(-1), plain.softmax(-1), reduction="batchmean")
    assert abs(loss[0] - loss[1]) < BOUND and float(divergence) < BOUND, (loss, float(divergence))


def test_published_keys() -> None:
    """At the published group size, the published ``quantization_config``, key for key."""
    assert int4_qwen.quantization_config("gptq", 4, 128) == PUBLISHED


def test_what_is_refused(tmp_path: Path) -> None:
    home, s = directory(tmp_path / "a" / "hf")

    def told(path: Path = home, longest: int = 512) -> str:
        with pytest.raises(UserError) as error:
            QwenDirectory.open(path, longest)
        return str(error.value)

    assert f"--max-length 4096: {home / 'config.json'} has seq_length 2048" in told(longest=4096)
    (home / "qwen.tiktoken").rename(tmp_path / "qwen.tiktoken")
    assert f"{home}: has no tokenizer, which writes the samples" in told()
    pieces = codefuse_published(tmp_path / "c")
    assert f"{pieces}: is in pieces; int4 takes one directory" in told(pieces)
    large = torch.full((s.vocab, s.hidden), 1e5, dtype=torch.bfloat16)
    other, _ = directory(tmp_path / "b" / "hf", changed={"transformer.wte.weight": large})
    assert "transformer.wte.weight: its largest value 99840 would be infinite in float16" in told(other)
