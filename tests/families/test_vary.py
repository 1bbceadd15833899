"""Vary-toy: published shapes, its template by tokenizer, one rendering missing, parts put together, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import llama
from safetensors.torch import load_file, save_file
from test_spliced_families import command, edit, refused, tokenized
from vary_models import Vary

from megavlm.checkpoint.hf.given import make_model
from megavlm.config.load import load_recipe
from megavlm.config.schema import ModelConfig
from megavlm.data.media import plan_of
from megavlm.families.known import FAMILIES
from megavlm.families.presets import expand_presets
from megavlm.weights.source import Source

pytestmark = pytest.mark.family("vary")
FAMILY = "vary"


def of(preset: str = "vary_toy", **more: Any) -> ModelConfig:
    return make_model({"preset": preset, **more}, preset)  # type: ignore[dict-item]


def test_published_shapes_and_keys() -> None:
    """As ``vary_toy_qwen1_8.py`` has them: 256 tokens of 2 x 1024, ids of the marks."""
    model = of()
    plan = plan_of(model)
    assert (plan.plan(640, 480).tokens, plan.sides) == (256, (224, 1024))
    assert (model.vision.feature_sizes, model.language.hidden_size) == ((1024, 1024), 2048)
    assert FAMILIES[FAMILY].refusal(model) is None
    tree = FAMILIES[FAMILY].config(model, {})
    keys = ("im_start_token", "im_end_token", "im_patch_token", "image_token_len", "vision_select_layer", "model_type")
    assert [tree[key] for key in keys] == [151857, 151858, 151859, 256, -2, "vary"]
    assert (tree["intermediate_size"], tree["vocab_size"]) == (11008, 151860)


@pytest.mark.parametrize("select", [-2, -1])
def test_a_configuration_that_is_written_is_read_alike(select: int, tmp_path: Path) -> None:
    family, hf = FAMILIES[FAMILY], Vary(select=select).save_pretrained(tmp_path / "hf")
    tokenized(hf, "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>")
    ids = [json.loads((hf / "tokenizer.json").read_text())["added_tokens"][at]["id"] for at in (-3, -2, -1)]
    state = load_file(hf / "model.safetensors")
    rows = {name: torch.cat([value] * 4)[: ids[2] + 1] for name, value in state.items() if value.shape[0] == 120}
    save_file(state | rows, hf / "model.safetensors", metadata={"format": "pt"})
    marks = dict(zip(("im_start_token", "im_end_token", "im_patch_token"), ids, strict=True))
    edit(hf / "config.json", vocab_size=ids[2] + 1, **marks)
    command("hf-to-megatron", "--hf", hf, "--out", tmp_path / "m")
    model = load_recipe(tmp_path / "m" / "recipe.yaml", [], expand_presets).model
    assert (model.template, model.vision.num_layers) == ("vary", 4 + select)
    before, path = family.branches(Source(hf)), hf / "config.json"
    own, written = json.loads(path.read_text()), family.config(model, family.tokens(Source(hf)))
    of_trainer = {
        "_name_or_path", "bf16", "fp16", "fp32", "freeze_vision_tower", "torch_dtype", "transformers_version",
        "use_cache", "use_flash_attn", "vision_tower",
    }  # fmt: skip
    assert written == {key: value for key, value in own.items() if key not in of_trainer} | {"vision_select_layer": -2}
    path.write_text(json.dumps(written | {"vision_select_layer": select}))
    assert family.branches(Source(hf)) == before


@pytest.mark.parametrize("select", [-2, -1])
def test_the_layer_that_was_read_is_written_again(select: int, tmp_path: Path) -> None:
    """Where another key changed, and so the file is written again."""
    hf = Vary(select=select).save_pretrained(tmp_path / "hf")
    command("hf-to-megatron", "--hf", hf, "--out", tmp_path / "m")
    recipe = tmp_path / "m" / "recipe.yaml"
    text = recipe.read_text()
    assert "max_position_embeddings: 8192" in text
    recipe.write_text(text.replace("max_position_embeddings: 8192", "max_position_embeddings: 4096"))
    command("megatron-to-hf", "--megatron", tmp_path / "m", "--out", tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (written["vision_select_layer"], written["max_position_embeddings"]) == (select, 4096)
    one, two = Source(hf), Source(tmp_path / "back")
    assert one.tensors.keys() == two.tensors.keys()
    assert FAMILIES[FAMILY].branches(one)["vision"] == FAMILIES[FAMILY].branches(two)["vision"]


def _without(word: str) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        path = source / "model.safetensors"
        save_file({n: v for n, v in load_file(path).items() if word not in n}, path, metadata={"format": "pt"})

    return change


def _shaped(name: str, *shape: int) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        path = source / "model.safetensors"
        save_file(load_file(path) | {name: torch.zeros(shape)}, path, metadata={"format": "pt"})

    return change


def _keys(**keys: Any) -> Callable[[Path], None]:
    return lambda source: edit(source / "config.json", **keys)


_HIGH, _LOW = "transformer.vision_tower_high.", "transformer.vision_tower.vision_model."


def _tables(side: int) -> Callable[[Path], None]:
    """Make SAM one of smaller pictures."""

    def change(source: Path) -> None:
        _shaped(f"{_HIGH}pos_embed", 1, side, side, 128)(source)
        for name in ("rel_pos_h", "rel_pos_w"):
            _shaped(f"{_HIGH}blocks.1.attn.{name}", 2 * side - 1, 64)(source)

    return change


BAD: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "one rendering: no SAM": (_without("vision_tower_high"), ("no whole SAM", "none of its layers", "for two towers")),
    "one rendering: no CLIP": (_without("vision_tower.vision_model"), ("no whole CLIP", "none of its", "two towers")),
    "a layer of SAM": (_without("vision_tower_high.blocks.0."), ("no whole SAM", "layers [1]")),
    "one projection": (_without("mm_projector_vary.bias"), ("transformer.mm_projector_vary.bias",)),
    "a convolution": (_without("net_3"), ("net_3.weight",)),
    "another rendering": (
        _tables(8), ("makes 2 x 2 features", "4 x 4", "size of pictures")
    ),
    "an oblong": (_shaped(f"{_HIGH}pos_embed", 1, 16, 8, 128), ("16 x 8 patches",)),
    "three axes": (_shaped(f"{_HIGH}pos_embed", 16, 16, 128), ("[16, 16, 128]", "four axes")),
    "windows": (_shaped(f"{_HIGH}blocks.1.attn.rel_pos_h", 9, 64), ("windows of [3, 5] patches",)),
    "heads": (_shaped(f"{_HIGH}pos_embed", 1, 16, 16, 100), ("100 wide", "64")),
    "a table of CLIP": (_shaped(f"{_LOW}embeddings.position_embedding.weight", 16, 128), ("has 16 rows",)),
    "tokens": (_keys(image_token_len=256), ("image_token_len is '256'", "16 features")),
    "marks": (_keys(use_im_start_end=False), ("use_im_start_end is False",)),
    "an id": (_keys(im_patch_token="<imgpad>"), ("im_patch_token is '<imgpad>'", "id of a token")),
    "an order": (_keys(im_end_token=100), ("im_start_token, im_end_token and im_patch_token are 117, 100 and 119",)),
    "no layer": (_keys(vision_select_layer=None), ("has no 'vision_select_layer'",)),
    "layers": (_keys(vision_select_layer=[-2, -1]), ("vision_select_layer is '[-2, -1]'",)),
    "Vary-tiny": (_keys(architectures=["varyOPTForCausalLM"]), ("'varyOPTForCausalLM'", "varyQwenForCausalLM is")),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_checkpoint_that_does_not_fit(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, words = BAD[name]
    source = Vary().save_pretrained(tmp_path / "hf")
    change(source)
    line = refused(capsys, "hf-to-megatron", "--hf", source, "--out", tmp_path / "m")
    assert str(source) in line and all(word in line for word in words), line
    assert not (tmp_path / "m").exists()


def test_towers_before_another_language_model_get_both_renderings(tmp_path: Path) -> None:
    """As the recipes' headers say, here before a Llama: fresh projections, and the plan of two renderings."""
    source = Vary().save_pretrained(tmp_path / "towers")
    llama().save_pretrained(tmp_path / "text")
    command(
        "hf-to-megatron", "--language", tmp_path / "text", "--vision", source, "--connector-preset", "two_linears",
        "--out", tmp_path / "m",
    )  # fmt: skip
    model = load_recipe(tmp_path / "m" / "recipe.yaml", [], expand_presets).model
    assert (model.image.kind, model.connector.preset, len(model.vision.towers)) == ("crop_squash", "two_linears", 2)
    assert "no Qwen v1" in str(FAMILIES[FAMILY].refusal(model))


def test_a_model_put_together_is_written_whole(tmp_path: Path) -> None:
    """Its towers, and a language model of its kind: home, where CLIP is whole as its code loads it, and back."""
    source = Vary().save_pretrained(tmp_path / "hf")
    command(
        "hf-to-megatron", "--language", source, "--vision", source, "--connector-preset", "two_linears",
        "--out", tmp_path / "a",
    )  # fmt: skip
    command("megatron-to-hf", "--megatron", tmp_path / "a", "--family", FAMILY, "--out", tmp_path / "home")
    before, after = Source(source), Source(tmp_path / "home")
    assert set(after.tensors) == set(before.tensors)
    kept = [name for name in before.tensors if "mm_projector" not in name]
    behind = {name for name in kept if name.startswith((f"{_LOW}encoder.layers.2.", f"{_LOW}post_"))}
    assert len(behind) == 18
    assert {name for name in kept if not torch.equal(before.get(name), after.get(name))} == behind
    command("hf-to-megatron", "--hf", tmp_path / "home", "--out", tmp_path / "b")
    models = [load_recipe(tmp_path / name / "recipe.yaml", [], expand_presets).model for name in "ab"]
    assert models[0].vision == models[1].vision and models[0].image == models[1].image


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "connector": ({"connector": {"preset": "hybrid_split"}}, "two linear layers side by side"),
    "order": ({"connector": {"first": "high"}}, "the first tower's first"),
    "mlp": ({"connector": {"preset": "mlp2x_gelu"}}, "the architecture mlp, not hybrid_split"),
    "plan": ({"image": {"kind": "fit_pair"}}, "pictures are made by fit_pair"),
    "filter": ({"image": {"resample": "bilinear"}}, "crop_squash (bilinear), Vary's by"),
    "mean": ({"vision": {"high_image_mean": [0.5] * 3}}, "model.vision.high_image_mean"),
    "rendering": ({"vision": {"low_from": "high"}}, "model.vision.low_from"),
    "second neck": ({"vision": {"high_second_neck_layer": 2}}, "high_second_neck_layer"),
    "stretched": ({"vision": {"high_image_size": 1280}}, "high_output_grid"),
    "places": ({"vision": {"high_output_grid": 32}}, "several features of a place"),
    "heads": ({"vision": {"high_num_attention_heads": 6}}, "heads are not 64 wide"),
    "epsilon": ({"vision": {"layernorm_epsilon": 1e-6}}, "Vary's 1e-05"),
    "activation": ({"vision": {"activation": "gelu"}}, "quick_gelu"),
    "tower": ({"vision": {"post_layernorm": True}}, "not CLIP's"),
    "language": ({"language": {"preset": "qwen1_5_1_8b", "num_query_groups": 4}}, "grouped queries"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_goes_home_as_none(name: str) -> None:
    more, reason = REFUSED[name]
    assert reason in str(FAMILIES[FAMILY].refusal(of(**more)))
