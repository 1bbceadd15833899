"""TinyLLaVA, MobileVLM, DenseConnector, xtuner's layout and HPT 1.5: what the rows of test_whole.py do not try.

Templates by tokenizer, sizes counted from the classes of the parts, models put together of parts and written anew,
small files in folders, and bad input.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import clip_vision, llava, siglip_vision, vicuna
from llava_connectors_models import CONNECTORS, dense, mobilevlm
from llava_like_models import LLAVA_LIKE
from peft import PeftModel
from pieces_models import PIECES, hpt, xtuner
from safetensors.torch import load_file, save_file
from spliced_models import Parts, Spliced
from spliced_rows import spliced_rows
from tinyllava_models import TINYLLAVA, tinyllava
from tokenizer_files import write_llava
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionModel, SiglipVisionModel
from whole import Lack
from whole_source import asked

from megavlm.checkpoint.hf.given import make_model, open_directory, understand
from megavlm.cli import main
from megavlm.config.help import to_tree
from megavlm.config.load import load_recipe
from megavlm.families.known import FAMILIES
from megavlm.families.presets import expand_presets
from megavlm.weights.source import Source

pytestmark = pytest.mark.family("xtuner")
ROWS = spliced_rows("", (), {})
PHI_3 = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
LLAMA_3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
WIDE = {"vocab_size": 448}


def tokenized(directory: Path, *tokens: str) -> Path:
    """Write a tokenizer that has these tokens, and Llama's."""
    path = write_llava(directory)
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(list(tokens))
    tokenizer.save(str(path))
    return path


def command(*words: object) -> None:
    assert main(["convert", *map(str, words)]) == 0


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["convert", *map(str, words)]) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("megavlm: error: ")]
    return line


TEMPLATES: dict[str, tuple[Callable[[], Parts], str, tuple[str, ...], str]] = {
    "tinyllava, phi": (lambda: tinyllava("phi", text_keys=WIDE), "", ("<|endoftext|>",), "vicuna_v1_endoftext"),
    "tinyllava, llama": (lambda: tinyllava("llama", text_keys=WIDE), "", (), "vicuna_v1"),
    "tinyllava, gemma": (lambda: tinyllava("gemma", text_keys=WIDE), "", ("<bos>", "<eos>"), "vicuna_v1_gemma"),
    "tinyllava, qwen2": (lambda: tinyllava("qwen2", text_keys=WIDE), "", ("<|endoftext|>",), "vicuna_v1_endoftext"),
    "tinyllava, instruct": (
        lambda: tinyllava("qwen2", text_keys=WIDE, llm_model_name_or_path="Qwen/Qwen2-0.5B-Instruct"), "",
        ("<|endoftext|>", "<|im_end|>"), "vicuna_v1_im_end",
    ),
    "mobilevlm": (lambda: mobilevlm(**WIDE), "", (), "vicuna_v1"),
    "dense": (lambda: dense(**WIDE), "", (), "vicuna_v1"),
    "dense, llama 3": (lambda: dense(**WIDE), "", LLAMA_3, "llama_3"),
    "xtuner": (lambda: xtuner(**WIDE), "", PHI_3, "phi_3"),
    "hpt": (hpt, "llm", LLAMA_3, "hpt_llama_3"),
    "hpt, edge": (lambda: hpt("phi3"), "llm", PHI_3, "phi_3"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_goes_by_language_model_and_tokenizer(name: str, tmp_path: Path) -> None:
    make, folder, tokens, wanted = TEMPLATES[name]
    Spliced(make()).save_pretrained(tmp_path)
    tokenized(tmp_path / folder, *tokens)
    found = understand(*(lambda given, home: (given, {}, home))(*open_directory(tmp_path)))
    assert found.model.template == wanted and found.tokenizer == tmp_path / folder / "tokenizer.json"


@pytest.mark.parametrize("name", ROWS)
def test_presets_have_the_sizes_of_their_parts(name: str) -> None:
    """Towers and language models as Transformers' classes have them, connectors by the published definition."""
    presets, family = ROWS[name].presets, FAMILIES[name]
    assert not isinstance(presets, Lack)
    for preset, published in presets.items():
        model = make_model_of(preset)
        tree = family.config(model, {})
        vision = tree.get("vision_config") or tree.get("visual_encoder/config.json") or family.tower_of(tree, Path())[0]
        text = tree.get("text_config") or tree
        kind = "llama" if text["model_type"] in ("mobilevlm", "llava_llama") else text["model_type"]
        own = {key: value for key, value in text.items() if key not in ("model_type", "architectures")}
        with torch.device("meta"):
            language = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **own))
            clip = "clip" in vision["model_type"]
            tower = (CLIPVisionModel if clip else SiglipVisionModel)(AutoConfig.for_model(**vision))
        encoder = tower.vision_model if hasattr(tower, "vision_model") else tower
        # Layers behind the features, the last norm and the pooling head are carried and not built.
        kept = sum(p.numel() for p in encoder.embeddings.parameters())
        kept += sum(
            p.numel() for layer in encoder.encoder.layers[: model.vision.num_layers] for p in layer.parameters()
        )
        kept += sum(p.numel() for p in encoder.pre_layrnorm.parameters()) if clip else 0
        count = kept + sum(p.numel() for p in language.parameters()) + connector_size(model)
        assert count == published.count, preset


def make_model_of(preset: str) -> Any:
    model = make_model({"preset": preset}, preset)  # type: ignore[dict-item]
    assert model.vision.hidden_size in (1024, 1152)
    return model


def connector_size(model: Any) -> int:
    """Return the parameters of a connector by its definition."""
    width, embed, connector = model.vision.hidden_size, model.language.hidden_size, model.connector
    mlp = embed * (width + 1) + embed * (embed + 1)
    if connector.preset == "ldpnet":
        inside = {2048: 512, 2560: 640}[embed]
        return mlp + 2 * (9 * embed + 2 * embed + inside * (embed + 1) + embed * (inside + 1) + embed**2 + 2 * embed)
    if connector.preset == "ldpnetv2":
        return mlp + 10 * embed
    return mlp + (2 * width * embed if connector.preset == "dense_dci" else 0)


COMPOSED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "tinyllava": (siglip_vision, "-2", "mlp2x_gelu"),
    "mobilevlm": (clip_vision, "-2", "ldpnet"),
    "dense_connector": (siglip_vision, "0,1,2", "dense_dci"),
    "xtuner": (clip_vision, "-2", "mlp2x_gelu"),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_what_is_put_together_of_parts_is_written_anew(name: str, tmp_path: Path) -> None:
    """As the recipes' headers say; read again it is the same model, and the same weights."""
    make, layers, connector = COMPOSED[name]
    make().save_pretrained(tmp_path / "tower")
    vicuna().save_pretrained(tmp_path / "text")
    tokenized(tmp_path / "text")
    command(
        "hf-to-megatron", "--language", tmp_path / "text", "--vision", tmp_path / "tower",
        f"--vision-feature-layer={layers}", "--connector-preset", connector, "--out", tmp_path / "a",
    )  # fmt: skip
    command("megatron-to-hf", "--megatron", tmp_path / "a", "--family", name, "--out", tmp_path / "hf")
    command("hf-to-megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "b")
    command("megatron-to-hf", "--megatron", tmp_path / "b", "--out", tmp_path / "back")
    one, two = (Source(tmp_path / path) for path in ("hf", "back"))
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(one.get(tensor), two.get(tensor)) for tensor in one.tensors)
    trees = [to_tree(load_recipe(tmp_path / path / "recipe.yaml", [], expand_presets).model) for path in "ab"]
    for part in ("vision", "connector", "language"):
        left = [tree[part] for tree in trees]
        assert {key: value for key, value in left[0].items() if key not in ("preset", "init_method_std")} == {
            key: value for key, value in left[1].items() if key not in ("preset", "init_method_std")
        }
    if name == "xtuner":  # whose tower has a layer behind the features
        assert one.shape("visual_encoder/vision_model.encoder.layers.2.mlp.fc1.weight") == (80, 48)


@pytest.mark.parametrize("name", ["xtuner", "hpt"])
def test_small_files_lie_in_their_folders_before_and_after_a_training(name: str, tmp_path: Path) -> None:
    folder = FAMILIES[name].text_folder
    parts = xtuner(**WIDE) if name == "xtuner" else hpt(text_keys=WIDE)
    source = Spliced(parts).save_pretrained(tmp_path / "hf")
    tokenized(source / folder, *(PHI_3 if name == "xtuner" else LLAMA_3))
    (source / "README.md").write_text("read me")
    (source / "projector" / "modeling_projector.py").write_text("raise SystemExit\n")
    command("hf-to-megatron", "--hf", source, "--out", tmp_path / "m")
    command("megatron-to-hf", "--megatron", tmp_path / "m", "--out", tmp_path / "back")
    files = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path / "back") for path in (tmp_path / "back").rglob("*") if path.is_file()} == files
    texts = [path for path in files if path.suffix != ".safetensors"]
    assert all((source / path).read_bytes() == (tmp_path / "back" / path).read_bytes() for path in texts)
    run = json.loads((tmp_path / "m" / "run.json").read_text())
    (tmp_path / "m" / "run.json").write_text(json.dumps(run | {"step": 3}))
    command("megatron-to-hf", "--megatron", tmp_path / "m", "--out", tmp_path / "trained")
    trained = tmp_path / "trained"
    stops = json.loads((trained / folder / "generation_config.json").read_text())["eos_token_id"]
    assert len(stops) > 1 and (trained / folder / "chat_template.jinja").is_file()
    pixels = json.loads((trained / "visual_encoder" / "preprocessor_config.json").read_text())
    assert pixels["size"] == ({"shortest_edge": 28} if name == "xtuner" else {"height": 448, "width": 448})
    assert not (trained / "preprocessor_config.json").exists()


def test_xtuners_layout_and_transformers_go_into_each_other(tmp_path: Path) -> None:
    """LLaVA-Phi-3-mini's Transformers form has a Llama; what both have is the same, bit for bit."""
    llava().save_pretrained(tmp_path / "hf")
    command("hf-to-megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "a")
    command("megatron-to-hf", "--megatron", tmp_path / "a", "--family", "xtuner", "--out", tmp_path / "x")
    command("hf-to-megatron", "--hf", tmp_path / "x", "--out", tmp_path / "b")
    command("megatron-to-hf", "--megatron", tmp_path / "b", "--family", "llava", "--out", tmp_path / "back")
    one, two = Source(tmp_path / "hf"), Source(tmp_path / "back")

    def named(source: Source) -> dict[str, str]:
        return {name.replace("vision_tower.vision_model.", "vision_tower."): name for name in source.tensors}

    ours, theirs = named(one), named(two)
    assert theirs.keys() <= ours.keys() and len(theirs) > len(ours) - 17  # the layer behind the features
    for name, there in theirs.items():
        if "post_layernorm" not in name:
            assert torch.equal(one.get(ours[name]), two.get(there)), name


def edit(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


BAD: dict[str, tuple[Callable[[Path], Path], str, dict[str, Any], tuple[str, ...]]] = {
    "connector": (TINYLLAVA["tinyllava"][1], "config.json", {"connector_type": "qformer"}, ("'qformer'", "mlpNx_gelu")),
    "depth": (TINYLLAVA["tinyllava"][1], "config.json", {"connector_type": "mlp3x_gelu"}, ("mlp3x_gelu", "mlp2x_gelu")),
    "language": (
        TINYLLAVA["tinyllava"][1], "config.json", {"text_config": {"model_type": "openelm"}}, ("'openelm'", "stablelm"),
    ),
    "two towers": (
        TINYLLAVA["tinyllava"][1], "config.json", {"vision_model_name_or_path2": "facebook/dinov2"}, ("dinov2", "''"),
    ),
    "tower": (TINYLLAVA["tinyllava"][1], "config.json", {"vision_hidden_size": 96}, ("96", "48 wide")),
    "strategy": (
        TINYLLAVA["tinyllava_stablelm"][1], "config.json", {"vision_feature_select_strategy": "cls_patch"},
        ("'cls_patch'", "CLIP", "'patch'"),
    ),
    "ldp": (CONNECTORS["mobilevlm"][1], "config.json", {"mm_projector_type": "ldpnetv2"}, ("'ldpnetv2'", "ldpnet;")),
    "ldp width": (CONNECTORS["mobilevlm"][1], "config.json", {"mm_hidden_size": 96}, ("96", "48 wide")),
    "ldp tower": (
        CONNECTORS["mobilevlm"][1], "vision_config.json", {"hidden_size": 96}, ("48", "96 wide"),
    ),
    "dense width": (CONNECTORS["dense_connector"][1], "config.json", {"mm_hidden_size": 48}, ("48", "dci", "144 wide")),
    "dense layers": (
        CONNECTORS["dense_connector"][1], "config.json", {"mm_dense_connector_type": "sci"}, ("7 and 15", "5 run"),
    ),
    "dense kind": (
        CONNECTORS["dense_connector_sci"][1], "config.json", {"mm_dense_connector_type": "sti"},
        ("144", "sti", "48 wide"),
    ),
    "projector width": (PIECES["xtuner"][1], "projector/config.json", {"visual_hidden_size": 96}, ("96", "48")),
    "projector text": (
        PIECES["hpt"][1], "projector/config.json", {"llm_hidden_size": 96}, ("96", "64", "llm/config.json"),
    ),
    "projector depth": (PIECES["xtuner"][1], "projector/config.json", {"depth": 3}, ("3", "mlp2x_gelu")),
    "projector bias": (PIECES["xtuner"][1], "projector/config.json", {"bias": False}, ("False", "True")),
    "other tower": (PIECES["hpt"][1], "visual_encoder/config.json", {"model_type": "vit"}, ("'vit'", "siglip")),
    "other language": (PIECES["hpt"][1], "llm/config.json", {"model_type": "mpt"}, ("'mpt'", "HPT")),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_configuration_that_does_not_fit(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, file, keys, words = BAD[name]
    source = make(tmp_path / "hf")
    edit(source / file, **keys)
    line = refused(capsys, "hf-to-megatron", "--hf", source, "--out", tmp_path / "m")
    assert str(source) in line and all(word in line for word in words), line
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("name", ["dense_connector_sti", "mobilevlm", "bunny_phi", "llava_phi"])
def test_a_system_without_its_tower(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is no LLaVA whose tower is apart, although a projector (that of sti) may be as wide as one's."""
    family, make = (CONNECTORS | LLAVA_LIKE)[name]
    source = make(tmp_path / "hf")
    state = {name: value for name, value in load_file(source / "model.safetensors").items() if "tower" not in name}
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    siglip_vision().save_pretrained(tmp_path / "tower")
    line = refused(capsys, "hf-to-megatron", "--hf", source, "--vision", tmp_path / "tower", "--out", tmp_path / "m")
    assert f"{source}: {FAMILIES[family].title} without a vision tower" in line, line


@pytest.mark.parametrize("folder", ["llm_adapter", "visual_encoder_adapter"])
def test_a_lora_beside_the_pieces(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """xtuner's code puts it on the part; it would be lost."""
    source = PIECES["xtuner"][1](tmp_path / "hf")
    (source / folder).mkdir()
    line = refused(capsys, "hf-to-megatron", "--hf", source, "--out", tmp_path / "m")
    assert f"{source / folder}: a LoRA of" in line, line


def test_tensors_that_no_row_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A ``.bin`` with more tensors than the table, and a piece that is missing."""
    source = CONNECTORS["mobilevlm"][1](tmp_path / "hf")
    state = {name: Source(source).get(name).clone() for name in Source(source).tensors}
    (source / "model.safetensors").unlink()
    torch.save({**state, "model.vlm_uni_query_projector.0.weight": torch.zeros(2)}, source / "pytorch_model.bin")
    line = refused(capsys, "hf-to-megatron", "--hf", source, "--out", tmp_path / "m")
    assert "vlm_uni_query_projector" in line and str(source) in line and "mobilevlm" in line
    pieces = PIECES["hpt"][1](tmp_path / "pieces")
    (pieces / "projector" / "model.safetensors").unlink()
    line = refused(capsys, "hf-to-megatron", "--hf", pieces, "--out", tmp_path / "m")
    assert str(pieces / "projector") in line and "holds no weights" in line


def test_the_first_feature_goes_with_families_that_leave_it_out() -> None:
    model = make_model({"preset": "tinyllava_1_5b"}, "here")  # type: ignore[dict-item]
    assert model.tokens_per_view == 728 and FAMILIES["tinyllava"].refusal(model) is None
    for name in ("llava", "llava_original", "hpt"):
        assert "drop_first_feature" in str(FAMILIES[name].refusal(model)), name


@pytest.mark.long
@pytest.mark.family("hpt")
def test_adapters_of_a_language_model_in_a_folder_are_its_own(tmp_path: Path) -> None:
    """PEFT puts them on what lies in ``llm/``; the whole model with it has the same logits."""
    from test_peft import adapted, bits, close
    from test_whole import logits_of

    given: Any = ROWS["hpt"].source
    source = given.model.save_pretrained(tmp_path / "hf")
    command("hf-to-megatron", "--hf", source, "--out", tmp_path / "m")
    saved = adapted(tmp_path / "m", tmp_path / "run", ("q_proj", "v_proj", "down_proj"), [])
    command("megatron-to-hf", "--megatron", saved, "--adapter", "--out", tmp_path / "peft")
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source / "llm"), tmp_path / "peft")
    names = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(names) == 4 * 3 * 2 and all(name.startswith("base_model.model.model.layers.") for name in names)
    recipe = load_recipe(tmp_path / "m" / "recipe.yaml", [], expand_presets)
    sample = given.shown(recipe.model, *asked(28)[2])
    expected = logits_of(saved, sample, given.image)
    with torch.no_grad():
        without = given.logits(sample)
        text = PeftModel.from_pretrained(given.model._kept[2], tmp_path / "peft").eval()
        close(given.logits(sample), expected)
        text.unload()
    assert (expected - without).abs().max() > 0.01  # the adapters matter
    command("hf-to-megatron", "--adapter", tmp_path / "peft", "--base", tmp_path / "m", "--out", tmp_path / "back")
    assert bits(tmp_path / "back") == bits(saved)
