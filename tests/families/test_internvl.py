"""InternVL computes what Transformers' class computes, with towers of both kinds, at one process and cut over four.

Weights there and back are in test_round_trips.py.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.nn.functional as F
from internvl_cases import IMAGE, compare
from internvl_models import internvl, internvl_6b, internvl_chat
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel

from megavlm.checkpoint.distributed import load
from megavlm.checkpoint.hf.shapes import alone, family_slots, make_rules
from megavlm.cli import main
from megavlm.config.load import load_recipe
from megavlm.config.schema import Recipe
from megavlm.data.media import plan_of
from megavlm.families.known import FAMILIES
from megavlm.families.preprocessor import trained_preprocessor
from megavlm.families.presets import expand_presets
from megavlm.inference.generate import generate
from megavlm.inference.prompt import Prompt
from megavlm.models.build import build_model, unwrap
from megavlm.parallel.state import process_groups

LAYOUT = [
    "parallel.tensor_model_parallel_size=2",
    "parallel.pipeline_model_parallel_size=2",
    "parallel.sequence_parallel=true",
]
MODELS: dict[str, Callable[[], PreTrainedModel]] = {"300m-qwen2": internvl, "6b-qwen3": internvl_6b}
TILE_SIZES = [[28, 28], [28, 56]]  # height, width: one tile; two and a thumbnail
VIEWS = 4


def convert(source: Path, out: Path) -> Recipe:
    assert main(["convert", "hf-to-megatron", "--hf", str(source), "--out", str(out)]) == 0
    return load_recipe(out / "recipe.yaml", [], expand_presets)


def write_reference(model: PreTrainedModel, recipe: Recipe, path: Path) -> None:
    """Write what Transformers computes of one sample, its gradients by the canonical names."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, IMAGE, (50,), generator=generator)
    ids[3:7] = ids[20:32] = IMAGE
    pixels = torch.randn(VIEWS, 3, 28, 28, generator=generator)
    labels = torch.where(ids == IMAGE, -100, ids)
    labels[:3] = -100
    features = model.get_image_features(pixels, vision_feature_layer=-1, vision_feature_select_strategy="default")
    out = model(input_ids=ids[None], pixel_values=pixels, attention_mask=torch.ones(1, len(ids)))
    loss = F.cross_entropy(out.logits[0, :-1], labels[1:], ignore_index=-100)
    loss.backward()
    stored = {
        "s0.input_ids": ids[None], "s0.pixel_values": pixels, "s0.image_sizes": torch.tensor(TILE_SIZES),
        "s0.labels": labels[None], "s0.logits": out.logits.detach(), "s0.loss": loss.detach().reshape(1),
        "s0.image_features": features.pooler_output.detach(),
    }  # fmt: skip
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    family = FAMILIES["internvl"]
    with alone():
        rules = make_rules(family, recipe.model, "modules", family_slots(family, recipe.model))
    for rule in rules:
        for name, gradient in zip(rule.row.ours, rule.to_ours([theirs.pop(n) for n in rule.row.theirs]), strict=True):
            assert gradient.abs().max() > 0, name
            stored["gradient." + name] = gradient
    assert not theirs
    for part in ("vision", "connector", "language"):
        largest = max(float(value.abs().max()) for name, value in stored.items() if f"gradient.{part}." in name)
        stored["largest." + part] = torch.tensor(largest)
    save_file({name: value.contiguous().clone() for name, value in stored.items()}, path)


@pytest.fixture(scope="module", params=MODELS)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    tmp = tmp_path_factory.mktemp("internvl")
    model = MODELS[request.param]()
    model.save_pretrained(tmp / "hf")
    recipe = convert(tmp / "hf", tmp / "m")
    assert recipe.model.template == "internvl2_5"
    assert (recipe.model.image.kind, recipe.model.image.max_tiles) == ("dynamic_tiles", 12)
    write_reference(model, recipe, tmp / "reference.safetensors")
    return str(tmp / "m"), str(tmp / "reference.safetensors")


def test_features_logits_and_gradients(converted: tuple[str, str]) -> None:
    found = compare(*converted, [])
    assert sum(name.startswith("vision.transformer") for name in found) >= 3 * 12


def test_features_logits_and_gradients_over_four_ranks(converted: tuple[str, str]) -> None:
    found = ranks.run("internvl_cases:compare", *converted, LAYOUT, world=4, timeout=240)
    one, many = found[0], set().union(*found)
    assert {name.split(".")[0] for name in one} == {"vision", "connector", "language"}  # the first stage has these
    assert {"language.decoder.layers.3.mlp.linear_fc2.weight", "language.output_layer.weight"} <= many


def test_greedy_answers_are_theirs(tmp_path: Path) -> None:
    """Of pictures that are not square: three views, one view, none."""
    model = internvl_6b()
    model.save_pretrained(tmp_path / "hf")
    recipe = convert(tmp_path / "hf", tmp_path / "m")
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, IMAGE, (30,), generator=generator)
    ids[4:16] = IMAGE
    one = ids[12:].clone()
    pixels = torch.randn(3, 3, 28, 28, generator=generator)
    assert len(plan_of(recipe.model).plan(56, 28).views) == 3
    shown = [(ids, pixels), (one, pixels[:1]), (ids[16:], pixels[:0])]
    expected = []
    for tokens, views in shown:
        images = {"pixel_values": views} if len(views) else {}
        whole = model.generate(input_ids=tokens[None], **images, attention_mask=torch.ones(1, len(tokens)),
                               do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0)  # fmt: skip
        expected.append(whole[0, len(tokens) :].tolist())
    with process_groups(recipe.parallel, 1):
        chunks = build_model(recipe, IMAGE)
        load(tmp_path / "m", modules=[unwrap(chunk) for chunk in chunks])
        prompts = [Prompt(tokens.numpy(), views) for tokens, views in shown]
        answers = generate(chunks, prompts, max_new_tokens=8, stop_ids=[], vocab_size=120, pack_length=128)
    assert answers == expected


def test_other_families_and_this_one_know_their_towers(tmp_path: Path) -> None:
    internvl().save_pretrained(tmp_path / "hf")
    model = convert(tmp_path / "hf", tmp_path / "m").model
    squash = dataclasses.replace(model.image, kind="squash", min_tiles=None, max_tiles=None)
    llava = dataclasses.replace(model, connector=_connector("mlp2x_gelu"), image=squash)
    assert "InternViT" in str(FAMILIES["llava"].refuses(llava))
    for changed, reason in (
        ({"image": dataclasses.replace(model.image, kind="pad")}, "image plan is pad"),
        ({"image": dataclasses.replace(model.image, thumbnail=False)}, "no thumbnail"),
        ({"connector": _connector("linear")}, "connector is linear"),
        ({"vision": dataclasses.replace(model.vision, layer_scale=False)}, "no InternViT"),
    ):
        assert reason in str(FAMILIES["internvl"].refuses(dataclasses.replace(model, **changed)))
    assert FAMILIES["internvl"].refuses(model) is None


def _connector(preset: str) -> Any:
    return load_recipe("quickstart", [f"model.connector={{preset: {preset}}}"], expand_presets).model.connector


def test_what_is_written_of_pictures_is_read_again(tmp_path: Path) -> None:
    """After a training: tiles as the processor's file has them."""
    internvl().save_pretrained(tmp_path / "hf")
    model = convert(tmp_path / "hf", tmp_path / "m").model
    model = dataclasses.replace(model, image=dataclasses.replace(model.image, max_tiles=6, resample="bilinear"))
    written = trained_preprocessor(model, {})
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(written))
    assert convert(tmp_path / "hf", tmp_path / "again").model.image == dataclasses.replace(model.image, min_tiles=1)
    assert FAMILIES["internvl"].processor(model, "x") == {"image_seq_length": 4, "processor_class": "InternVLProcessor"}


def test_a_written_config_gives_the_same_model_in_transformers(tmp_path: Path) -> None:
    """The authors' layout in, Transformers' out, written anew, dynamic positions and all."""
    model = internvl_6b()
    internvl_chat(tmp_path / "chat", model)
    convert(tmp_path / "chat", tmp_path / "m")
    out = tmp_path / "hf"
    words = ["--megatron", str(tmp_path / "m"), "--family", "internvl", "--out", str(out)]
    assert main(["convert", "megatron-to-hf", *words]) == 0
    back, info = AutoModelForImageTextToText.from_pretrained(
        out, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    assert back.config.image_token_id == IMAGE
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in model.state_dict().items())
    # And back again, to the authors' layout: nothing is lost on the way.
    convert(out, tmp_path / "again")
    words = ["--megatron", str(tmp_path / "again"), "--family", "internvl_chat", "--out", str(tmp_path / "chat-2")]
    assert main(["convert", "megatron-to-hf", *words]) == 0
    first, last = (convert(tmp_path / name, tmp_path / f"{name}-m").model for name in ("chat", "chat-2"))
    assert first == last


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_tied_where_there_is_none(tied: bool, tmp_path: Path) -> None:
    """Whatever a configuration leaves to Transformers' default, which is that it is."""
    internvl(tied=tied).save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for tree in (config, config["text_config"]):
        tree.pop("tie_word_embeddings", None)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert convert(tmp_path / "hf", tmp_path / "m").model.language.tie_word_embeddings is tied


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "ratio": ({"downsample_ratio": 0.3}, "downsample_ratio is 0.3"),
    "ratio of no whole squares": ({"downsample_ratio": 1 / 3}, "the 4 x 4 patches"),
    "no ratio": ({"downsample_ratio": 0}, "downsample_ratio is 0"),
    "a text for a ratio": ({"downsample_ratio": "half"}, "downsample_ratio is 'half'"),
    "older order of patches": ({"ps_version": "v1"}, "ps_version is 'v1'"),
    "InternLM": ({"llm_config": {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"]}}, "InternLM2.5"),
    "experts": ({"llm_config": {"model_type": "qwen3_moe"}}, "mixture of experts"),
    "several layers": ({"select_layer": [-1, -2]}, "feature layer"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_known_is_said(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed, message = BAD[name]
    directory = internvl_chat(tmp_path / "hf")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changed))
    words = ["convert", "hf-to-megatron", "--hf", str(directory), "--out", str(tmp_path / "m")]
    assert main(words) == 2
    assert message in capsys.readouterr().err
