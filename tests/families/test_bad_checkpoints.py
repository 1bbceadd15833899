"""Bad input of every registered family: what config.json and weights say of each other, and what lies beside them.

Each line names both: the file, and what in it, or beside it, does not fit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_round_trips import CASES, make

from megavlm.checkpoint.hf.given import open_directory, understand
from megavlm.checkpoint.hf.pickled import by_part
from megavlm.checkpoint.hf.shapes import alone, family_slots, make_rules
from megavlm.cli import main
from megavlm.families.known import FAMILIES
from megavlm.weights.source import Source

SHORT = ("llava", "bunny", "tinyllava", "minicpm_v_2", "gemma3", "hpt")
"""Families of which ``make test`` tries it; of the others test-families does."""
FIRST = {family: case for case, family in reversed(CASES.items())}
"""A checkpoint of each family."""
NAMES_OF_PARTS = (
    "model_type", "mm_projector_type", "connector_type", "mm_vision_tower", "image_projector_type", "arch_specifier",
    "vision_backbone_id", "llm_backbone_id",
)  # fmt: skip
NAMELESS = ("minicpm_v", "minicpm_v_2", "qwen_vl", "cogvlm", "cogagent", "vary")
"""Families whose config.json names no part: their code has one of each."""
OTHER = "no_such_part"


def families(*, whole: bool) -> list[Any]:
    """Return all families, or those that have all three parts."""
    return [
        pytest.param(name, marks=[pytest.mark.family(name), *[pytest.mark.long] * (name not in SHORT)])
        for name in FIRST
        if not whole or {"vision", "connector", "language"} <= {*FAMILIES[name].parts}
    ]


def refused(capsys: pytest.CaptureFixture[str], source: Path, out: Path) -> str:
    """Convert what cannot be converted; return the line that says so."""
    code = main(["convert", "hf-to-megatron", "--hf", str(source), "--out", str(out)])
    said = capsys.readouterr().err
    assert code == 2, (f"{source} was converted", said[-2000:])
    assert not out.exists()
    (line,) = [one for one in said.splitlines() if one.startswith("megavlm: error: ")]
    return line


def named_parts(tree: dict[str, Any], inside: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the places of a configuration that name a part: of the whole model's kind none."""
    for key, value in tree.items():
        if isinstance(value, dict) and key != "slice_config":
            yield from named_parts(value, (*inside, key))
        elif key in NAMES_OF_PARTS and isinstance(value, str) and (inside or key != "model_type"):
            yield (*inside, key)


def with_value(tree: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Return a configuration with another value at a place."""
    key, *rest = place
    return {**tree, key: with_value(tree[key], tuple(rest), value) if rest else value}


@pytest.mark.family("qwen3_moe")
def test_an_expert_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of those that have tensors of their own."""
    source = make("qwen3_moe", tmp_path / "hf")
    path, name = weights(source), "model.layers.0.mlp.experts.3.down_proj.weight"
    state = loaded(path)
    shape = list(state.pop(name).shape)
    save(state, path)
    line = refused(capsys, source, tmp_path / "m")
    assert f"{name}: missing; the configuration asks for it with the shape {shape}" in line


@pytest.mark.family("qwen3_vl_moe")
def test_experts_of_one_tensor_that_are_too_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its first axis counts them."""
    source = make("qwen3_vl_moe", tmp_path / "hf")
    path = weights(source)
    state = loaded(path)
    name = next(key for key in state if key.endswith("mlp.experts.down_proj"))
    whole = list(state[name].shape)
    state[name] = state[name][:-1].clone()
    save(state, path)
    line = refused(capsys, source, tmp_path / "m")
    assert name in line and str(list(state[name].shape)) in line and str(whole) in line


@pytest.mark.parametrize("name", families(whole=True))
def test_a_part_that_the_family_does_not_have(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever names a part, in any file of the configuration."""
    source, tried = make(FIRST[name], tmp_path / "hf"), 0
    # A tower may be called anything where its shape lies beside.
    beside = any((source / file).exists() for file in ("vision_config.json", "visual_config.json"))
    for path in sorted(source.rglob("config.json")):
        tree = json.loads(path.read_text())
        inside = path.parent != source
        for place in [*named_parts(tree), *[("model_type",)] * inside]:
            if beside and place[-1] == "mm_vision_tower":
                continue
            path.write_text(json.dumps(with_value(tree, place, OTHER)))
            line = refused(capsys, source, tmp_path / "m")
            assert OTHER in line and str(source) in line, (place, line)
            tried += 1
        path.write_text(json.dumps(tree))
    assert bool(tried) != (name in NAMELESS)


def weights(source: Path, tensor: str | None = None) -> Path:
    """Return the file of a tensor, or of the connector's weights, which all makers but those of pieces write one of."""
    if tensor is not None and tensor.partition("/")[0] in Source(source).pieces:
        return Source(source).tensors[tensor].file
    pieces = (
        source / "projector" / "model.safetensors",
        source / "pretrained_minigpt.pth",
        source / "checkpoints" / "latest-checkpoint.pt",
    )
    return next((piece for piece in pieces if piece.exists()), source / "model.safetensors")


def loaded(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file; those of a ``.pth`` stand under a key, Cobra's by part."""
    if path.suffix == ".pt":
        return {f"{part}.{key}": one for part, own in torch.load(path)["model"].items() for key, one in own.items()}
    state: dict[str, Any] = torch.load(path)["model"] if path.suffix == ".pth" else load_file(path)
    return state


def save(state: dict[str, torch.Tensor], path: Path) -> None:
    """Write them as they were."""
    if path.suffix == ".pth":
        torch.save({"model": state}, path)
    elif path.parent.name == "checkpoints":
        torch.save({"model": by_part(state)}, path)
    elif path.suffix == ".safetensors":
        save_file(state, path, metadata={"format": "pt"})
    else:
        torch.save(state, path)


def towards_the_tower(name: str, source: Path) -> tuple[str, int]:
    """Return a tensor of the connector, and its axis that is as wide as what the tower gives, or so many times."""
    family, opened = FAMILIES[name], Source(source)
    given, _ = open_directory(source)
    model = understand(given, {}, source).model
    with alone():
        rules = make_rules(family, model, family.style_of(opened), family_slots(family, model))
    width, embed = model.vision.hidden_size, model.language.hidden_size
    if name == "cobra":  # whose projector takes both towers' features side by side
        width = model.vision.feature_size
    for rule in rules:
        if not rule.row.ours[0].startswith("connector."):
            continue
        for tensor in rule.row.theirs:
            shape = opened.shape(tensor) if tensor in opened else ()
            for axis in sorted(range(len(shape)), reverse=True):
                if len(shape) > 1 and shape[axis] % width == 0 and shape[axis] != embed:
                    return tensor, axis
    raise AssertionError(f"{name}: no tensor of the connector is as wide as the tower")


# But Chameleon, whose connector has no weights.
@pytest.mark.parametrize("name", [one for one in families(whole=True) if one.values != ("chameleon",)])
def test_a_tower_of_another_size_than_the_projector_expects(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make(FIRST[name], tmp_path / "hf")
    tensor, axis = towards_the_tower(name, source)
    path, own = weights(source, tensor), tensor.rpartition("/")[2]
    state = loaded(path)
    width = state[own].size(axis)
    state[own] = torch.cat([state[own], state[own]], axis)
    save(state, path)
    line = refused(capsys, source, tmp_path / "m")
    assert str(source) in line and str(2 * width) in line and str(width) in line, line


@pytest.mark.parametrize("name", families(whole=False))
def test_what_no_row_knows_and_a_lora_beside(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A ``.bin`` with a tensor more than the table, then an adapter beside whole weights."""
    source = make(FIRST[name], tmp_path / "hf")
    path = weights(source)
    if path.suffix == ".pth" or path.parent.name == "checkpoints":
        state = loaded(path)
    elif path.exists():
        state = load_file(path)
        path.unlink()
        path = path.with_name("pytorch_model.bin")
    else:
        (path,) = [*source.glob("*.bin"), *source.glob("*.pt")]
        state = torch.load(path)
    extra = "of_nobody.weight"
    save({**state, extra: torch.zeros(2)}, path)
    line = refused(capsys, source, tmp_path / "m")
    assert extra in line and str(source) in line and name in line, line
    save(state, path)
    for file, text in (("adapter_config.json", "{}"), ("adapter_model.safetensors", "")):
        (source / file).write_text(text)
    line = refused(capsys, source, tmp_path / "m")
    own = [file.name for file in source.rglob("*") if file.suffix in (".bin", ".pt", ".safetensors")]
    assert str(source / "adapter_config.json") in line and "--adapter" in line, line
    assert any(f"beside {file}" in line for file in own if file != "adapter_model.safetensors"), line
