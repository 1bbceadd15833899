"""Every tensor of a source is used or set aside by a named rule; anything else is an error that names it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import hf_makers
import pytest
import torch
from hf_makers import SMALL
from qwen_reference import State

from megavlm.checkpoint.hf.given import SourceOfParts, make_model
from megavlm.cli import main

FC = "transformer.h.1.mlp.c_proj.weight"


def change(name: str, value: torch.Tensor | None) -> Callable[[State], None]:
    def damage(state: State) -> None:
        state.pop(name, None)
        if value is not None:
            state[name] = value

    return damage


PROBLEMS: dict[str, tuple[Callable[[State], None], str]] = {
    "missing": (change(FC, None), f"{FC}: missing; the configuration asks for it with the shape [128, 88]"),
    "shape": (
        change(FC, torch.zeros(88, 128)),
        f"{FC}: has the shape [88, 128], the configuration asks for [128, 88]",
    ),
    "rank": (
        change("transformer.visual.conv1.weight", torch.zeros(40, 147)),
        "transformer.visual.conv1.weight: has the shape [40, 147], the configuration asks for [40, 3, 7, 7]",
    ),
    "fused-qkv": (
        change("transformer.h.0.attn.c_attn.weight", torch.zeros(256, 128)),
        "transformer.h.0.attn.c_attn.weight: has the shape [256, 128], the configuration asks for [384, 128]",
    ),
    "vocabulary": (
        change("transformer.wte.weight", torch.zeros(121, 128)),
        "transformer.wte.weight: has the shape [121, 128], the configuration asks for [120, 128]",
    ),
    "unknown": (
        change("transformer.h.1.mlp.c_fc.weight", torch.zeros(2)),
        "transformer.h.1.mlp.c_fc.weight: unknown to the family qwen_vl",
    ),
    "another-layer": (
        change("transformer.h.2.ln_1.weight", torch.zeros(128)),
        "transformer.h.2.ln_1.weight: unknown to the family qwen_vl",
    ),
    "int8": (
        change(FC, torch.zeros(128, 88, dtype=torch.int8)),
        f"{FC}: is of type I8; only floating point is converted, so quantised weights are not",
    ),
    "fp8": (change(FC, torch.zeros(128, 88).to(torch.float8_e4m3fn)), f"{FC}: is of type F8_E4M3;"),
    "layers-of-two-types": (
        change(FC, torch.zeros(128, 88).half()),
        f"{FC}: is torch.float16, but transformer.h.0.mlp.c_proj.weight, which is kept in one tensor with it, is"
        " torch.float32",
    ),
    "gate-and-up-of-two-types": (
        change("transformer.h.0.mlp.w1.weight", torch.zeros(88, 128).half()),
        "transformer.h.0.mlp.w1.weight: is torch.float16, but transformer.h.0.mlp.w2.weight",
    ),
}


def convert(directory: Path, out: Path) -> int:
    return main(["convert", "hf-to-megatron", "--hf", str(directory), "--out", str(out)])


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = PROBLEMS[name]
    state = hf_makers.state()
    damage(state)
    directory = hf_makers.write(tmp_path / "hf", state)
    assert convert(directory, tmp_path / "m") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"megavlm: error: {directory}: {message}") and error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def test_a_slip_in_a_name_gets_a_hint_and_both_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = hf_makers.state()
    state["transformer.h.1.mlp.c_proj.wieght"] = state.pop(FC)
    assert convert(hf_makers.write(tmp_path / "hf", state), tmp_path / "m") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and f"{FC}: missing" in lines[0]
    assert lines[1].endswith(f"c_proj.wieght: unknown to the family qwen_vl; is it {FC}?")


def test_many_problems_are_capped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {name: value for name, value in hf_makers.state().items() if ".h.1." not in name}
    state |= {f"extra.{i}": torch.zeros(1) for i in range(10)}
    assert convert(hf_makers.write(tmp_path / "hf", state), tmp_path / "m") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6 and lines[-1].endswith(": and 13 more")


def test_buffers_are_ignored_by_named_rules(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = hf_makers.state()
    state |= {
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        "transformer.h.1.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "transformer.rotary_emb.inv_freq": torch.ones(16),
    }
    with caplog.at_level(logging.INFO):
        assert convert(hf_makers.write(tmp_path / "hf", state), tmp_path / "m") == 0
    record = json.loads((tmp_path / "m" / "hf" / "conversion.json").read_text())
    assert record["ignored"] == {
        "causal mask buffer": ["transformer.h.0.attn.masked_bias", "transformer.h.1.attn.bias"],
        "rotary frequency buffer": ["transformer.rotary_emb.inv_freq"],
    }
    assert record["carried"] == []
    assert "ignored: 2 x causal mask buffer (transformer.h.0.attn.masked_bias)" in caplog.text
    assert "ignored: 1 x rotary frequency buffer (transformer.rotary_emb.inv_freq)" in caplog.text


def test_everything_is_used_in_a_sound_source(source: Path) -> None:
    from megavlm.checkpoint.hf.accounting import check_source
    from megavlm.checkpoint.hf.shapes import alone, family_slots, make_rules

    given = SourceOfParts.open(source)
    model = make_model(given.branches, "here")
    with alone():
        rules = make_rules(given.family, model, given.style, family_slots(given.family, model))
    account = check_source(given.source, given.family, given.style, model, rules)
    assert sorted(account.used) == sorted(hf_makers.state()) and not account.carried and not account.ignored


def _bad_configs() -> dict[str, tuple[str, object]]:
    """Every key of the configuration with values of the wrong kind or out of range."""
    cases = {}
    whole = hf_makers.config()
    for key, value in {**whole, **{f"visual.{k}": v for k, v in whole["visual"].items()}}.items():
        for bad in (None, "many", [1], -3, 0, 7, float("nan")):
            if bad != value:
                cases[f"{key}={bad!r}"] = (key, bad)
    return cases


BAD_CONFIGS = _bad_configs()


def test_a_wrong_configuration_is_never_a_traceback(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Either one clear line, or (where a value has no bearing on the weights) a conversion."""
    unclear, converted = [], set()
    for number, (name, (key, bad)) in enumerate(BAD_CONFIGS.items()):
        config = hf_makers.config(SMALL)
        branch, _, leaf = key.rpartition(".")
        (config[branch] if branch else config)[leaf] = bad
        (source / "config.json").write_text(json.dumps(config))
        out = source.parent / f"m{number}"
        try:
            status = convert(source, out)
        except Exception as error:
            unclear.append(f"{name}: {type(error).__name__}: {error}")
            continue
        lines = capsys.readouterr().err.splitlines()
        if status == 0:
            converted.add(name)
        elif status != 2 or not lines or not all(line.startswith("megavlm: error: ") for line in lines):
            unclear.append(f"{name}: {status} {lines}")
        if status != 0 and (out.exists() or out.with_name(out.name + ".partial").exists()):
            unclear.append(f"{name}: left something behind")
    assert not unclear, "\n".join(unclear)
    # What has no bearing on the weights' shapes, and what falls back to a default.
    assert {name.split("=")[0] for name in converted} <= {
        "kv_channels", "layer_norm_epsilon", "max_position_embeddings", "no_bias", "rotary_emb_base",
        "tie_word_embeddings", "visual.image_size", "visual.image_start_id", "visual.n_queries",
    }  # fmt: skip
