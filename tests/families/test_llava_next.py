"""LLaVA-1.6 and LLaVA-OneVision compute what Transformers' classes compute, with pictures of its own processors.

Weights there and back are in test_round_trips.py.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
import torch.nn.functional as F
import yaml
from family_cases import _TEXT
from internvl_cases import compare
from llava_next_models import (
    IMAGE,
    VIDEO,
    llava_next,
    llava_next_mistral,
    llava_onevision,
    next_files,
    onevision_files,
)
from PIL import Image
from safetensors.torch import save_file
from tokenizer_files import write_llava
from torch import Tensor
from transformers import AutoModelForImageTextToText, LlamaConfig, PreTrainedModel, Qwen2Config
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from megavlm.checkpoint.distributed import load
from megavlm.checkpoint.hf.shapes import alone, family_slots, make_rules
from megavlm.cli import main
from megavlm.config.load import load_recipe
from megavlm.config.schema import Recipe
from megavlm.data.media import arrange, plan_of
from megavlm.families.known import FAMILIES
from megavlm.families.preprocessor import trained_preprocessor
from megavlm.families.presets import expand_presets
from megavlm.inference.generate import generate
from megavlm.inference.prompt import Prompt
from megavlm.models.build import build_model, unwrap
from megavlm.parallel.state import process_groups

FAMILY = {"next": "llava_next", "mistral": "llava_next", "onevision": "llava_onevision"}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "next": llava_next,
    "mistral": llava_next_mistral,
    "onevision": llava_onevision,
}
# Width and height: neither is square. LLaVA-OneVision's are above its limit, so features are interpolated.
SIZES = {"next": [(61, 40), (30, 80)], "mistral": [(61, 40)], "onevision": [(90, 70)]}
LAYOUT = [
    "parallel.tensor_model_parallel_size=2",
    "parallel.pipeline_model_parallel_size=2",
    "parallel.sequence_parallel=true",
]


def of(name: str, *, long: bool = False) -> Any:
    marks = [pytest.mark.family(FAMILY[name]), *([pytest.mark.long] if long else [])]
    return pytest.param(name, marks=marks)


def convert(source: Path, out: Path) -> Recipe:
    assert main(["convert", "hf-to-megatron", "--hf", str(source), "--out", str(out)]) == 0
    return load_recipe(out / "recipe.yaml", [], expand_presets)


def pictures(name: str, sizes: list[tuple[int, int]]) -> tuple[dict[str, Tensor], Tensor]:
    """Return what Transformers' processor makes of photographs of ``sizes``, and the views one after the other."""
    np.random.seed(3)
    images = [Image.fromarray(np.random.randint(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    several = name == "onevision" and len(sizes) > 1
    if name == "onevision":
        files = {key: value for key, value in onevision_files().items() if key != "image_processor_type"}
        made = LlavaOnevisionImageProcessorPil(**files)([images] if several else images, return_tensors="pt")
    else:
        files = {key: value for key, value in next_files().items() if key != "image_processor_type"}
        made = LlavaNextImageProcessorPil(**files)(images, return_tensors="pt")
    given = {key: torch.as_tensor(made[key]) for key in ("pixel_values", "image_sizes")}
    if several:
        given["batch_num_images"] = torch.as_tensor(made["batch_num_images"])
    return given, given["pixel_values"]


def sample(name: str, recipe: Recipe, sizes: list[tuple[int, int]]) -> tuple[Tensor, dict[str, Tensor], Tensor, Any]:
    """Return token ids with slots, what Transformers takes, views, and the layouts by the plan here."""
    plan = plan_of(recipe.model)
    layouts = [plan.plan(width, height, len(sizes)) for width, height in sizes]
    given, padded = pictures(name, sizes)
    views = torch.cat([one[: len(layout.views)] for one, layout in zip(padded, layouts, strict=True)])
    words = torch.randint(0, IMAGE - 1, (12 + 6 * len(sizes),), generator=torch.Generator().manual_seed(2))
    pieces = [words[:5]]
    for number, layout in enumerate(layouts):
        pieces += [torch.full((layout.tokens,), IMAGE), words[5 + 6 * number : 11 + 6 * number]]
    return torch.cat([*pieces, words[-7:]]), given, views, layouts


def write_reference(name: str, model: PreTrainedModel, recipe: Recipe, path: Path) -> None:
    """Write what Transformers computes of one sample, its gradients by the canonical names."""
    ids, given, views, _ = sample(name, recipe, SIZES[name])
    labels = torch.where(ids == IMAGE, -100, ids)
    labels[:3] = -100
    features = model.model.get_image_features(
        **given,
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        **({"vision_aspect_ratio": model.config.vision_aspect_ratio} if name == "onevision" else {}),
    )
    out = model(input_ids=ids[None], **given, attention_mask=torch.ones(1, len(ids)))
    loss = F.cross_entropy(out.logits[0, :-1], labels[1:], ignore_index=-100)
    loss.backward()
    stored = {
        "s0.input_ids": ids[None], "s0.pixel_values": views, "s0.image_sizes": given["image_sizes"],
        "s0.labels": labels[None], "s0.logits": out.logits.detach(), "s0.loss": loss.detach().reshape(1),
        "s0.image_features": torch.cat(list(features.pooler_output)).detach(),
    }  # fmt: skip
    theirs = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    family = FAMILIES[FAMILY[name]]
    with alone():
        rules = make_rules(family, recipe.model, "modules5", family_slots(family, recipe.model))
    for rule in rules:
        for key, gradient in zip(rule.row.ours, rule.to_ours([theirs.pop(n) for n in rule.row.theirs]), strict=True):
            assert gradient.abs().max() > 0, key
            stored["gradient." + key] = gradient
    assert not theirs and "gradient.connector.image_newline" in stored
    for part in ("vision", "connector", "language"):
        largest = max(float(value.abs().max()) for key, value in stored.items() if f"gradient.{part}." in key)
        stored["largest." + part] = torch.tensor(largest)
    save_file({key: value.contiguous().clone() for key, value in stored.items()}, path)


@pytest.mark.parametrize("name", [of("next"), of("mistral", long=True), of("onevision")])
def test_features_logits_gradients_and_steps(name: str, tmp_path: Path) -> None:
    """At one process and at TP 2 x PP 2 with sequence parallelism."""
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "hf")
    recipe = convert(tmp_path / "hf", tmp_path / "m")
    assert recipe.model.image.kind == ("anyres_max" if name == "onevision" else "anyres")
    assert recipe.model.image.max_tiles == (2 if name == "onevision" else None)
    write_reference(name, model, recipe, tmp_path / "reference.safetensors")
    where = str(tmp_path / "m"), str(tmp_path / "reference.safetensors")
    found, losses = compare(*where, [])
    assert "connector.image_newline" in found
    assert losses[0] > losses[1] > losses[2]
    results = ranks.run("internvl_cases:compare", *where, LAYOUT, world=4, timeout=240)
    assert set().union(*(there for there, _ in results)) == set(found)
    for _, there in results:
        assert there == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("name", [of("next"), of("onevision")])
def test_greedy_answers_are_theirs(name: str, tmp_path: Path) -> None:
    """Of one picture, of two, which LLaVA-OneVision shows otherwise, and of none."""
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "hf")
    recipe = convert(tmp_path / "hf", tmp_path / "m")
    shown, expected = [], []
    plan = plan_of(recipe.model)
    for sizes in ([(50, 33)], [(61, 40), (30, 80)]):
        ids, given, views, layouts = sample(name, recipe, sizes)
        shown.append(Prompt(ids.numpy(), views, arrange(plan, layouts)))
        expected.append(_answer(model, ids, given))
    ids = torch.arange(9)
    shown.append(Prompt(ids.numpy(), torch.zeros(0, 3, 28, 28)))
    expected.append(_answer(model, ids, {}))
    with process_groups(recipe.parallel, 1):
        chunks = build_model(recipe, IMAGE)
        load(tmp_path / "m", modules=[unwrap(chunk) for chunk in chunks])
        answers = generate(chunks, shown, max_new_tokens=8, stop_ids=[], vocab_size=120, pack_length=256)
    assert answers == expected


def _answer(model: PreTrainedModel, ids: Tensor, given: dict[str, Tensor]) -> list[int]:
    whole = model.generate(input_ids=ids[None], **given, attention_mask=torch.ones(1, len(ids)), do_sample=False,
                           max_new_tokens=8, eos_token_id=None, pad_token_id=0)  # fmt: skip
    return whole[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", [of("next"), of("onevision")])
def test_what_is_written_anew_is_read_again(name: str, tmp_path: Path) -> None:
    """The files of a trained export, with other tiles than came in; and a config.json that Transformers loads."""
    family = FAMILIES[FAMILY[name]]
    MODELS[name]().save_pretrained(tmp_path / "hf")
    model = convert(tmp_path / "hf", tmp_path / "m").model
    fewer = dataclasses.replace(model.image, pinpoints=((28, 56), (56, 28)), resample="bilinear")
    if name == "onevision":
        fewer = dataclasses.replace(fewer, max_tiles=1)
    changed = dataclasses.replace(model, image=fewer)
    config = json.loads((tmp_path / "hf" / "config.json").read_text()) | family.config(changed, {"image": IMAGE})
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    old = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(trained_preprocessor(changed, old)))
    (tmp_path / "hf" / "processor_config.json").write_text(json.dumps(family.processor(changed, "<image>")))
    again = convert(tmp_path / "hf", tmp_path / "again").model
    assert again.image == fewer
    assert (again.vision, again.language, again.connector) == (model.vision, model.language, model.connector)
    back = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    assert back.config.image_grid_pinpoints == [[28, 56], [56, 28]]
    assert back.config.vision_config.num_hidden_layers == model.vision.num_layers
    assert family.refuses(model) is None
    for other, reason in (
        ({"image": dataclasses.replace(model.image, kind="squash", pinpoints=(), max_tiles=None)}, "squash"),
        ({"image": dataclasses.replace(model.image, fill=(9, 9, 9))}, "pads with black"),
        ({"image": dataclasses.replace(model.image, pinpoints=((28, 30),))}, "28 x 30"),
    ):
        assert reason in str(family.refuses(dataclasses.replace(model, **other)))
    assert "image plan" in str(FAMILIES["llava"].refuses(model))


@pytest.mark.parametrize("name", [of("next", long=True), of("onevision", long=True)])
def test_a_trained_export_is_what_was_trained(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Transformers' processor, model and template, of a checkpoint as it came, and as it goes home with other tiles."""
    text = {**_TEXT, "vocab_size": 448, "eos_token_id": 2}
    model = llava_onevision(Qwen2Config(**text)) if name == "onevision" else llava_next(LlamaConfig(**text))
    model.config.image_token_index = 329
    model.save_pretrained(tmp_path / "hf")
    write_llava(tmp_path / "hf")
    family = FAMILIES[FAMILY[name]]
    recipe = convert(tmp_path / "hf", tmp_path / "m")
    processor = family.processor(recipe.model, "<image>")
    (tmp_path / "hf" / "processor_config.json").write_text(json.dumps(processor))
    with caplog.at_level(logging.INFO):
        assert main(["convert", "check", "--hf", str(tmp_path / "hf")]) == 0, caplog.text
    assert caplog.text.count("greedy answers: equal") == 3 and "all within the tolerance" in caplog.text
    path = tmp_path / "m" / "recipe.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["model"]["image"]["pinpoints"] = [[28, 56], [56, 28]]
    if name == "onevision":
        tree["model"]["image"]["max_tiles"] = 1
    path.write_text(yaml.safe_dump(tree))
    state = json.loads((tmp_path / "m" / "run.json").read_text()) if (tmp_path / "m" / "run.json").is_file() else {}
    (tmp_path / "m" / "run.json").write_text(json.dumps(state | {"step": 3}))
    out = tmp_path / "trained"
    assert main(["convert", "megatron-to-hf", "--megatron", str(tmp_path / "m"), "--out", str(out)]) == 0
    config, pixels = (json.loads((out / f"{kind}config.json").read_text()) for kind in ("", "preprocessor_"))
    assert config["image_grid_pinpoints"] == pixels["image_grid_pinpoints"] == [[28, 56], [56, 28]]
    if name == "onevision":
        assert config["vision_aspect_ratio"] == "anyres_max_1"
        assert json.loads((out / "processor_config.json").read_text())["vision_aspect_ratio"] == "anyres_max_1"
        assert config["video_token_index"] == VIDEO
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert main(["convert", "check", "--hf", str(out)]) == 0, caplog.text
    assert caplog.text.count("greedy answers: equal") == 3 and "all within the tolerance" in caplog.text
    if name == "next":  # without torchvision there is no processor of films, and so no processor, of the other
        assert caplog.text.count("token ids equal") == 3 and "not compared:" not in caplog.text


BAD: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, tuple[str, ...]]] = {
    "tiles": ("next", {"image_grid_pinpoints": [[28, 50]]}, {"image_grid_pinpoints": [[28, 50]]},
              ("28 x 50", "preprocessor_config.json", "28 x 28", "config.json")),
    "other pinpoints": ("next", {}, {"image_grid_pinpoints": [[28, 56]]},
                        ("image_grid_pinpoints is 28 x 56", "28 x 56, 56 x 28", "/config.json")),
    "no pinpoints": ("next", {"image_grid_pinpoints": []}, {"image_grid_pinpoints": []}, ("is empty",)),
    "class token": ("next", {"vision_feature_select_strategy": "full"}, {}, ("'full'", "class token", "'default'")),
    "no class token": ("onevision", {"vision_feature_select_strategy": "default"}, {}, ("'default'", "'full'")),
    "no processor": ("next", {}, None, ("neither preprocessor_config.json nor", "config.json's tower")),
    "another processor": ("onevision", {}, {"image_processor_type": "CLIPImageProcessor"},
                          ("CLIPImageProcessor", "llava_onevision")),
    "another side": ("next", {}, {"size": {"shortest_edge": 56}}, ("tiles of 56", "28 x 28")),
    "limit": ("onevision", {"vision_aspect_ratio": "square"}, {}, ("vision_aspect_ratio is 'square'",)),
    "window": ("mistral", {"text_config": {"sliding_window": 64}}, {}, ("sliding_window", "64", "256")),
    "not resized": ("next", {}, {"do_resize": False}, ("do_resize is false",)),
}  # fmt: skip


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiles")
    for name, model in MODELS.items():
        model().save_pretrained(root / name)
    return {name: root / name for name in MODELS}


@pytest.mark.family("llava_next", "llava_onevision")
@pytest.mark.parametrize("case", BAD)
def test_what_is_not_known_is_said(
    case: str, directories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, config, processor, words = BAD[case]
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "model.safetensors").symlink_to(directories[name] / "model.safetensors")
    old = json.loads((directories[name] / "config.json").read_text())
    if "text_config" in config:
        config = {"text_config": {**old["text_config"], **config["text_config"]}}
    (hf / "config.json").write_text(json.dumps(old | config))
    if processor is not None:
        tree = json.loads((directories[name] / "preprocessor_config.json").read_text())
        (hf / "preprocessor_config.json").write_text(json.dumps(tree | processor))
    assert main(["convert", "hf-to-megatron", "--hf", str(hf), "--out", str(tmp_path / "m")]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not (tmp_path / "m").exists()
