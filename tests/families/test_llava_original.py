"""LLaVA in its authors' layout: to and from Transformers', a tower apart, stage 1's projector alone, and bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from family_cases import _TEXT, clip_vision, llava, llava_layers, llava_original, load, original_name, vicuna
from family_cases import write as write_directory
from hf_makers import Canary
from tokenizer_files import write_llama, write_llava
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlavaForConditionalGeneration

from megavlm.checkpoint.hf import outgoing
from megavlm.checkpoint.hf.given import make_model, open_directory, understand
from megavlm.cli import main
from megavlm.data.chat import encode_conversation
from megavlm.data.schema import Conversation, Turn
from megavlm.data.templates import find_template
from megavlm.data.tokenizer import load_tokenizer
from megavlm.families.known import FAMILIES
from megavlm.families.llava_original import TOWERS
from megavlm.weights.source import Source

pytestmark = pytest.mark.family("llava_original")


def convert_in(out: Path, *words: object) -> Path:
    assert main(["convert", "hf-to-megatron", *map(str, words), "--out", str(out)]) == 0
    return out


def convert_out(checkpoint: Path, out: Path, *more: str) -> Path:
    assert main(["convert", "megatron-to-hf", "--megatron", str(checkpoint), "--out", str(out), *more]) == 0
    return out


def refused(capsys: pytest.CaptureFixture[str], out: Path, *words: object) -> str:
    """Convert what cannot be converted; return the one line that says so."""
    assert main(["convert", "hf-to-megatron", *map(str, words), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("megavlm: error: ")]
    assert len(lines) == 1 and "Traceback" not in error and not out.exists(), error
    return lines[0]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    source = Source(directory)
    return {name: source.get(name) for name in source.tensors}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def edit(directory: Path, **keys: Any) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return directory


PHI_3 = ("<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|system|>", "<|end|>", "<|user|>")
"""What microsoft/Phi-3-mini-4k-instruct adds to Llama's tokens; each but the first eats the white space behind it."""
PHI_3_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
)


@pytest.mark.parametrize(("tokens", "template"), [(PHI_3, "phi_3"), ((), "vicuna_v1")])
def test_a_llama_speaks_as_its_own_tokenizer_does(tokens: tuple[str, ...], template: str, tmp_path: Path) -> None:
    """LLaVA-Phi-3-mini is a Llama by config.json: its tokenizer says Phi-3, and Transformers writes the same ids."""
    source = llava_original(tmp_path / "hf", llava(LlamaConfig(**{**_TEXT, "vocab_size": 448})))
    path = write_llava(source)
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(
        [AddedToken(one, normalized=False, rstrip=number > 0) for number, one in enumerate(tokens)]
    )
    tokenizer.save(str(path))
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "chat_template": PHI_3_CHAT}
    (source / "tokenizer_config.json").write_text(json.dumps(own))
    given, home = open_directory(source)
    found = understand(given, {}, home)
    assert found.model.template == template and found.tokenizer == path
    if not tokens:
        return
    turns = [
        Turn("user", "How many cats?"),
        Turn("assistant", "Two."),
        Turn("user", "Sure?"),
        Turn("assistant", "Yes."),
    ]
    ours = encode_conversation(Conversation("", turns, (), ""), load_tokenizer(path, find_template(template)), [], None)
    theirs = AutoTokenizer.from_pretrained(source)
    text = theirs.apply_chat_template([{"role": one.role, "content": one.text} for one in turns], tokenize=False)
    assert ours.tokens.tolist() == theirs(text, add_special_tokens=False)["input_ids"]
    trained = [label for label in ours.labels.tolist() if label >= 0]
    assert theirs.decode(trained).replace(" ", "") == "Two.<|end|>Yes.<|end|>"


@pytest.mark.parametrize("layers", [1, 2])
def test_from_transformers_layout_to_the_authors_and_back(layers: int, tmp_path: Path) -> None:
    """Layers behind the features and the norm after them come along: every tensor, bit for bit, and its name."""
    model = llava() if layers == 1 else llava_layers()
    model.save_pretrained(tmp_path / "hf")
    before = load(tmp_path / "hf")
    ours = convert_in(tmp_path / "a", "--hf", tmp_path / "hf")
    original = convert_out(ours, tmp_path / "original", "--family", "llava_original")
    assert equal(tensors(original), {original_name(name): value for name, value in before.items()})
    config = json.loads((original / "config.json").read_text())
    assert (
        config["mm_hidden_size"] == 48 * layers
        and config["mm_vision_select_layer"] == model.config.vision_feature_layer
    )
    assert json.loads((original / "vision_config.json").read_text())["num_hidden_layers"] == 3
    back = convert_out(convert_in(tmp_path / "b", "--hf", original), tmp_path / "back", "--family", "llava")
    named = {name.replace("vision_tower.vision_model.", "vision_tower."): v for name, v in tensors(back).items()}
    assert equal(named, {name.replace("vision_tower.vision_model.", "vision_tower."): v for name, v in before.items()})
    again, info = LlavaForConditionalGeneration.from_pretrained(back, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.config.vision_feature_layer == model.config.vision_feature_layer


def test_a_tower_that_is_apart_stays_apart_until_it_learns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = llava_original(tmp_path / "hf", tower=False)
    found = convert_in(tmp_path / "a", "--hf", source)  # at the path that config.json names
    edit(source, mm_vision_tower="openai/clip-of-nobody")
    given = convert_in(tmp_path / "b", "--hf", source, "--vision", tmp_path / "hf-tower")
    for checkpoint in (found, given):
        back = convert_out(checkpoint, tmp_path / f"{checkpoint.name}-back")
        assert equal(tensors(back), tensors(source))
    assert (tmp_path / "b-back" / "config.json").read_text() == (source / "config.json").read_text()
    assert (found / "recipe.yaml").is_file()
    line = refused(capsys, tmp_path / "c", "--hf", source)
    assert "'openai/clip-of-nobody'" in line and "--vision DIR" in line
    whole = llava_original(tmp_path / "whole")
    line = refused(capsys, tmp_path / "c", "--hf", whole, "--vision", tmp_path / "hf-tower")
    assert f"--vision {tmp_path / 'hf-tower'}" in line and str(whole) in line and "leave it out" in line
    # A tower that was trained here goes home with the rest, and LLaVA's code is told to take it from there.
    monkeypatch.setattr(outgoing, "tower_learnt", lambda checkpoint, base=None: True)
    trained = convert_out(given, tmp_path / "trained")
    inside = convert_out(
        convert_in(tmp_path / "d", "--hf", edit(whole, unfreeze_mm_vision_tower=False)), tmp_path / "e"
    )
    assert json.loads((inside / "config.json").read_text())["unfreeze_mm_vision_tower"] is True
    assert any("vision_tower" in name for name in tensors(trained))
    assert json.loads((trained / "config.json").read_text())["unfreeze_mm_vision_tower"] is True


def stage(checkpoint: Path, out: Path, load: Path, *, freeze: bool) -> Path:
    """Return what a run of 5 steps would have left that began with ``load``."""
    shutil.copytree(checkpoint, out)
    tree = yaml.safe_load((out / "recipe.yaml").read_text())
    tree["modules"] = {**(tree.get("modules") or {}), "vision": {"freeze": freeze}}
    tree["checkpoint"] = {**(tree.get("checkpoint") or {}), "load": str(load)}
    (out / "recipe.yaml").write_text(yaml.safe_dump(tree))
    (out / "run.json").write_text(json.dumps({"step": 5}))
    return out


def test_a_tower_that_an_earlier_stage_trained_goes_home(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last stage freezes it; the files without a tower would name the one from before all of them."""
    source = llava_original(tmp_path / "hf", tower=False)
    base = convert_in(tmp_path / "base", "--hf", source)
    moved = base.rename(tmp_path / "moved")  # its recipe names the place where it was
    never = stage(moved, tmp_path / "never", moved, freeze=True)
    assert not any("vision_tower" in name for name in tensors(convert_out(never, tmp_path / "a")))
    first = stage(moved, tmp_path / "first", moved, freeze=False)
    second = stage(first, tmp_path / "second", first, freeze=True)
    back = convert_out(second, tmp_path / "b")
    assert any("vision_tower" in name for name in tensors(back))
    assert json.loads((back / "config.json").read_text())["unfreeze_mm_vision_tower"] is True
    words = ["--megatron", second, "--family", "llava_original_apart", "--out", tmp_path / "c"]
    assert main(["convert", "megatron-to-hf", *map(str, words)]) == 2
    assert "--family llava_original_apart: the tower learned" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
    shutil.rmtree(first)  # then nobody can tell
    assert any("vision_tower" in name for name in tensors(convert_out(second, tmp_path / "d")))


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector."])
def test_the_projector_of_stage_1_alone(prefix: str, tmp_path: Path) -> None:
    whole = llava_original(tmp_path / "hf")
    own = {n: v for n, v in load(whole).items() if "mm_projector" in n}
    stage1 = tmp_path / "stage1"
    stage1.mkdir()
    torch.save({n.replace("model.mm_projector.", prefix): v for n, v in own.items()}, stage1 / "mm_projector.bin")
    (stage1 / "config.json").write_text((whole / "config.json").read_text())  # as LLaVA's trainer leaves it
    clip_vision().save_pretrained(tmp_path / "clip")
    vicuna().save_pretrained(tmp_path / "vicuna")
    for n, path in enumerate((stage1, stage1 / "mm_projector.bin")):
        words = ["--language", tmp_path / "vicuna", "--vision", tmp_path / "clip", "--connector", path]
        ours = convert_in(tmp_path / f"a{n}", *words)
        out = convert_out(ours, tmp_path / f"back{n}", "--family", "mm_projector")
        assert [file.name for file in out.iterdir()] == ["mm_projector.bin"]
        assert equal(torch.load(out / "mm_projector.bin", weights_only=True), own)


def test_a_tower_with_a_public_name_is_called_by_it() -> None:
    """And read back as the same tower, though the exported one ends where its features are taken."""
    family = FAMILIES["llava_original"]
    for name, layers in (("openai/clip-vit-large-patch14-336", -2), ("google/siglip-so400m-patch14-384", [-2, 4])):
        tree = family.with_tower({}, TOWERS[name], layers)
        there = layers if isinstance(layers, int) else [-2, 4 - TOWERS[name]["num_hidden_layers"] - 1]
        assert tree == {"mm_vision_tower": name, "mm_vision_select_layer": there}
    model = make_model({"vision": {"preset": "clip_vit_l_14_336"}, "connector": {"preset": "mlp2x_gelu"}}, "here")
    config = family.config(model, {})
    assert (config["mm_vision_tower"], config["mm_vision_select_layer"]) == ("openai/clip-vit-large-patch14-336", -2)
    assert "vision_config.json" not in config


def test_a_picture_gets_a_slot_in_a_vocabulary_that_has_none(tmp_path: Path) -> None:
    """LLaVA's own code has the number -200 for it; rows are made for it, and are gone again in what goes home."""
    source = llava_original(tmp_path / "hf", llava(LlamaConfig(**{**_TEXT, "vocab_size": 360})))
    write_llama(source)  # 360 pieces, and no token of a picture
    ours = convert_in(tmp_path / "a", "--hf", source)
    record = json.loads((ours / "hf" / "conversion.json").read_text())
    assert record["rows"] == 360 and record["model"]["language"]["vocab_size"] > 360
    back = convert_out(ours, tmp_path / "back")
    assert equal(tensors(back), load(source))
    assert (back / "config.json").read_text() == (source / "config.json").read_text()


BAD_KEYS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "width": ({"mm_hidden_size": 96}, ("mm_hidden_size is 96", "48 wide")),
    "depth": ({"mm_projector_type": "mlp3x_gelu"}, ("mm_projector_type is 'mlp3x_gelu'", "mlp2x_gelu")),
    "identity": ({"mm_projector_type": "identity"}, ("'identity'", "mlp2x_gelu")),
    "tower": ({"mm_vision_tower": "acme/eyes"}, ("'acme/eyes'", "vision_config.json")),
    "class token": ({"mm_vision_select_feature": "cls_patch"}, ("'cls_patch'", "'patch'")),
    "layer": ({"mm_vision_select_layer": -9}, ("-9", "3 layers")),
    "layers": ({"mm_vision_select_layer": [-2, True]}, ("neither a number nor a list",)),
    "markers": ({"mm_use_im_start_end": True}, ("mm_use_im_start_end is True", "False")),
    "tiles": ({"image_aspect_ratio": "anyres"}, ("image_aspect_ratio is 'anyres'", "'pad'")),
    "window": ({"model_type": "llava_mistral", "sliding_window": 4096}, ("sliding_window is 4096", "null")),
    "language": ({"model_type": "llava_mpt"}, ("'llava_mpt'", "llava_llama, llava_qwen, llava_mistral")),
}


@pytest.mark.parametrize("name", BAD_KEYS)
def test_a_configuration_that_does_not_fit(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys, parts = BAD_KEYS[name]
    source = edit(llava_original(tmp_path / "hf"), **keys)
    line = refused(capsys, tmp_path / "m", "--hf", source)
    assert str(source / "config.json") in line and all(part in line for part in parts), line


def test_a_projector_that_is_for_other_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip_vision().save_pretrained(tmp_path / "clip")
    vicuna().save_pretrained(tmp_path / "vicuna")
    parts = ["--language", tmp_path / "vicuna", "--vision", tmp_path / "clip"]

    def stage1(name: str, width: int = 48, hidden: int = 64, **config: Any) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        shapes = {"0.weight": (hidden, width), "0.bias": (hidden,), "2.weight": (hidden, hidden), "2.bias": (hidden,)}
        state = {f"model.mm_projector.{key}": torch.randn(shape) for key, shape in shapes.items()}
        torch.save(state, directory / "mm_projector.bin")
        (directory / "config.json").write_text(json.dumps({"model_type": "llava", **config}))
        return directory

    line = refused(capsys, tmp_path / "m", *parts, "--connector", stage1("wide", width=96))
    assert all(part in line for part in (str(tmp_path / "wide"), "features 96 wide", str(tmp_path / "clip"), "48 wide"))
    line = refused(capsys, tmp_path / "m", *parts, "--connector", stage1("long", hidden=80))
    assert all(part in line for part in ("tokens 80 wide", str(tmp_path / "vicuna"), "64 wide"))
    line = refused(capsys, tmp_path / "m", *parts, "--connector", stage1("layer", mm_vision_select_layer=-1))
    assert "mm_vision_select_layer is -1" in line and "layer 2 of 3 is taken; give --vision-feature-layer=-1" in line
    line = refused(capsys, tmp_path / "m", *parts, "--connector", stage1("named", mm_hidden_size=1024))
    assert "mm_hidden_size is 1024" in line and "48 wide" in line


def test_weights_that_are_damaged_or_would_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pickle with code in it is not opened; half a download is said to be one, of either kind."""
    state = load(llava_original(tmp_path / "whole"))
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    code = write_directory(tmp_path / "code", {}, config)
    (code / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Canary(tmp_path / "ran")}, code / "pytorch_model.bin")
    line = refused(capsys, tmp_path / "m", "--hf", code)
    assert "pytorch_model.bin" in line and "could run code" in line and not (tmp_path / "ran").exists()
    half = write_directory(tmp_path / "half", {}, config)
    (half / "model.safetensors").unlink()
    names = sorted(state)
    weight_map = {}
    for shard, own in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-{shard:05d}-of-00002.bin"
        torch.save({name: state[name] for name in own}, half / file)
        weight_map |= dict.fromkeys(own, file)
    (half / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    second = half / "pytorch_model-00002-of-00002.bin"
    content = second.read_bytes()
    second.write_bytes(content[: len(content) // 2])
    line = refused(capsys, tmp_path / "m", "--hf", half)
    assert str(second) in line and "truncated" in line
    second.unlink()
    line = refused(capsys, tmp_path / "m", "--hf", half)
    assert f"{second}: missing, though pytorch_model.bin.index.json names it" in line
    missing = write_directory(tmp_path / "missing", {n: v for n, v in state.items() if n != names[0]}, config)
    assert names[0] in refused(capsys, tmp_path / "m", "--hf", missing)


def test_several_layers_go_only_where_they_can(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tower alone, cut at two layers; the recipe's rules on them; and its way home."""
    clip_vision().save_pretrained(tmp_path / "clip")
    vicuna().save_pretrained(tmp_path / "vicuna")
    words = ["--language", tmp_path / "vicuna", "--vision", tmp_path / "clip"]
    ours = convert_in(tmp_path / "a", *words, "--vision-feature-layer=-2,1")
    record = json.loads((ours / "hf" / "conversion.json").read_text())
    assert record["model"]["vision"]["feature_layers"] == [2, 1] and record["model"]["vision"]["num_layers"] == 2
    back = convert_out(ours, tmp_path / "back", "--family", "llava")
    assert json.loads((back / "config.json").read_text())["vision_feature_layer"] == [2, 1]
    line = refused(capsys, tmp_path / "m", *words, "--vision-feature-layer=-2;1")
    assert "'-2;1'" in line and "commas" in line
    for wrong, part in (("[3, 1]", "must be model.vision.num_layers (2)"), ("[2, -1]", "0 or more")):
        overrides = ["data.train.0.path=x", f"model.vision.feature_layers={wrong}"]
        assert main(["train", str(ours / "recipe.yaml"), *overrides]) == 2
        assert f"model.vision.feature_layers: {wrong}" in (error := capsys.readouterr().err) and part in error
