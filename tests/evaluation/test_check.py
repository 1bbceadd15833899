"""``megavlm convert check``: tiny LLaVAs through Transformers and through the model here."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import family_cases
import pytest
from family_cases import _VISION, llava
from internvl_models import internvl_answers
from llava_published import TEXT, publish
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizer_files import write_llava
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from megavlm.cli import main
from megavlm.evaluation.check import run
from megavlm.evaluation.check.pictures import drawn

SIGLIP = SiglipVisionConfig(**_VISION, vision_use_head=False)
FULL = {"vision_feature_select_strategy": "full"}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "clip-llama": lambda: llava(LlamaConfig(**TEXT, rms_norm_eps=1e-5)),
    "clip-two-layers-llama": lambda: llava(LlamaConfig(**TEXT), vision_feature_layer=[-2, -3]),
    "siglip-qwen2-tied": lambda: llava(Qwen2Config(**TEXT, tie_word_embeddings=True), SIGLIP, **FULL,
                                       tie_word_embeddings=True),
    "laion-qwen3": lambda: llava(Qwen3Config(**TEXT, head_dim=32), CLIPVisionConfig(**_VISION, hidden_act="gelu")),
}  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint, not to be changed."""
    return publish(tmp_path_factory.mktemp("published") / "hf", MODELS["clip-llama"]())


def checked(caplog: pytest.LogCaptureFixture, code: int, *words: object) -> str:
    """Check; return what was said."""
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert main(["convert", "check", *map(str, words)]) == code, caplog.text
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("name", MODELS)
def test_equal_models_are_equal(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = checked(caplog, 0, "--hf", publish(tmp_path / "hf", MODELS[name]()))
    assert "1: drawn-1.png" in text and "2: drawn-2.png" in text and "3: no picture" in text
    assert text.count("greedy answers: equal") == 3 and "all within the tolerance" in text
    assert "not compared: token ids: the checkpoint has no chat template" in text
    assert "Transformers 5" in text and "LlavaForConditionalGeneration, fp32" in text
    assert not list(tmp_path.glob("megavlm-check-*"))


def test_tiles_of_internvl_are_equal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its processor cannot be made without torchvision: the views are ours, and that is said."""
    hf = internvl_answers(tmp_path / "hf")
    text = checked(caplog, 0, "--hf", hf)
    assert "InternVLForConditionalGeneration, fp32" in text and text.count("greedy answers: equal") == 3
    assert "not compared: pixels and token ids: AutoProcessor" in text and "all within the tolerance" in text
    moved = load_file(hf / "model.safetensors")
    name = next(key for key in moved if key.endswith("multi_modal_projector.linear_1.weight"))
    moved[name][0] += 1
    save_file(moved, tmp_path / "changed.safetensors", metadata={"format": "pt"})
    assert main(["convert", "hf-to-megatron", "--hf", str(hf), "--out", str(tmp_path / "m")]) == 0
    (hf / "model.safetensors").write_bytes((tmp_path / "changed.safetensors").read_bytes())
    assert "ABOVE the tolerance" in checked(caplog, 1, "--hf", hf, "--checkpoint", tmp_path / "m")


def test_users_pictures_prompts_and_checkpoint(
    published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Converted once, checked twice; and a weight that was changed since is found."""
    wide = tmp_path / "wide.png"
    Image.open(drawn(tmp_path)[0]).crop((10, 20, 300, 90)).save(wide)
    converted = tmp_path / "m"
    assert main(["convert", "hf-to-megatron", "--hf", str(published), "--out", str(converted)]) == 0
    words = ["--hf", published, "--checkpoint", converted, "--image", wide, "--prompt", "How many?", "What is it?"]
    text = checked(caplog, 0, *words, "--max-new-tokens", 4)
    assert "1: wide.png, 'How many?'" in text and "2: wide.png, 'What is it?'" in text and "3: no picture" in text
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in published.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    state = load_file(changed / "model.safetensors")
    name = "language_model.model.layers.2.mlp.down_proj.weight"
    state[name][3] += 0.05
    save_file(state, changed / "model.safetensors", metadata={"format": "pt"})
    text = checked(caplog, 1, "--hf", changed, "--checkpoint", converted, "--image", wide)
    assert (
        "ABOVE the tolerance" in text and "differs: logits" in text and "image features" not in text.split("differs")[1]
    )
    assert checked(caplog, 0, "--hf", changed, "--checkpoint", converted, "--image", wide, "--tolerance", 0.9)


def test_a_tower_that_was_changed_and_other_pixels(
    published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A bias of the tower reaches everything; a processor that crops makes other pixels, and nothing else differs."""
    converted, other = tmp_path / "m", tmp_path / "other"
    assert main(["convert", "hf-to-megatron", "--hf", str(published), "--out", str(converted)]) == 0
    other.mkdir()
    for file in published.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    pixels = json.loads((other / "preprocessor_config.json").read_text())
    pixels |= {"do_center_crop": True, "size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    (other / "preprocessor_config.json").write_text(json.dumps(pixels))
    text = checked(caplog, 1, "--hf", other, "--checkpoint", converted)
    found = [line for line in text.splitlines() if line.startswith("differs: ")]
    assert [line.split(" of ")[0] for line in found] == ["differs: pixels"] * 2
    state = load_file(other / "model.safetensors")
    next(v for n, v in state.items() if n.endswith("layers.0.mlp.fc1.bias") and "vision" in n).add_(0.5)
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    text = checked(caplog, 1, "--hf", other, "--checkpoint", converted)
    assert "differs: pixels, image features, logits" in text


def test_the_authors_layout_goes_through_transformers(
    published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Transformers has no class for it: an export takes the weights there, the tower from beside them."""
    source = family_cases.llava_original(tmp_path / "hf", MODELS["clip-two-layers-llama"](), tower=False)
    write_llava(source)
    text = checked(caplog, 0, "--hf", source)
    assert "all within the tolerance" in text and "not compared: the names of the weights" in text
    assert text.count("(100.00% within one)") == 2


def test_what_their_processor_cannot_do_is_said(
    published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in published.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tree = json.loads((other / "processor_config.json").read_text())
    (other / "processor_config.json").write_text(json.dumps(tree | {"processor_class": "NobodysProcessor"}))
    (other / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "NobodysImageProcessor"}))
    text = checked(caplog, 0, "--hf", other)
    assert "not compared: pixels and token ids: " in text and text.count("pixels not compared") == 3


def test_a_template_of_its_own(published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Token ids are compared where the checkpoint has a template; the model's differences are those of equal ids."""
    other = tmp_path / "other"
    other.mkdir()
    for file in published.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    template = (
        "{% for m in messages %}QUESTION: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}"
        "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %} ANSWER:"
    )
    (other / "chat_template.jinja").write_text(template)
    converted = tmp_path / "m"  # of the checkpoint without it, so with another template
    assert main(["convert", "hf-to-megatron", "--hf", str(published), "--out", str(converted)]) == 0
    text = checked(caplog, 1, "--hf", other, "--checkpoint", converted)
    found = [line.split(" of ")[0] for line in text.splitlines() if line.startswith("differs: ")]
    assert found == ["differs: token ids"] * 3 and text.count("greedy answers: equal") == 3


def test_wrong_input(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*words: object) -> str:
        assert main(["convert", "check", *map(str, words)]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    bare = tmp_path / "bare"
    bare.mkdir()
    for file in published.iterdir():
        if "processor" not in file.name:
            (bare / file.name).write_bytes(file.read_bytes())
    line = refused("--hf", bare)
    assert (
        "neither preprocessor_config.json nor processor_config.json" in line
        and "28 x 28 pixels that config.json" in line
    )
    family_cases.make("vicuna", tmp_path / "vicuna")
    assert "check compares whole models" in refused("--hf", tmp_path / "vicuna")
    qwen = family_cases.make("qwen_vl", tmp_path / "qwen_vl")
    (qwen / "preprocessor_config.json").write_text("{}")
    line = refused("--hf", qwen)
    assert "Transformers 5" in line and "megavlm convert verify" in line
    assert "--image /nowhere.png: no such file" in refused("--hf", published, "--image", "/nowhere.png")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    assert "broken.png" in refused("--hf", published, "--image", tmp_path / "broken.png")
    assert "--tolerance" in refused("--hf", published, "--tolerance", "2")
    assert "prompt is empty" in refused("--hf", published, "--prompt", " ")
    monkeypatch.setattr(run, "free_memory", lambda: 1000)
    line = refused("--hf", published)
    assert "GiB of memory in fp32" in line and "--dtype bf16" in line
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "not under torchrun" in refused("--hf", published)


def test_free_memory_is_what_a_container_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megavlm.parallel import free_memory

    monkeypatch.setattr(free_memory, "has_cuda", lambda: False)
    monkeypatch.setattr(free_memory, "_CGROUP", tmp_path)
    whole = free_memory.free_memory()
    assert whole > 1 << 20
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 100\n")
    assert abs(free_memory.free_memory() - whole) < 1 << 30
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_memory.free_memory() == 500
