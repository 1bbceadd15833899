"""Chameleon: its picture tokens in bad input, and what does not go with them. Parity: test_whole.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from chameleon_models import CODES, FILES, FIRST, IMAGE, NAMES, SIDE, chameleon, save
from run_cases import alike, tensors
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText
from whole_source import photographs

from megavlm.architectures.cost import Kernels, Pictures
from megavlm.architectures.towers.vq_gan import cost
from megavlm.checkpoint.distributed import load
from megavlm.cli import main
from megavlm.config.checks import check_recipe
from megavlm.config.errors import RecipeError
from megavlm.config.load import load_recipe
from megavlm.config.schema import Recipe
from megavlm.families.known import FAMILIES
from megavlm.families.presets import expand_presets
from megavlm.inference.codes import codes_of
from megavlm.models.build import build_model, unwrap
from megavlm.models.codes import encoder_digest
from megavlm.models.fusion import Codes
from megavlm.parallel.state import process_groups

PLAIN = "model.vision.code_order=[]"
pytestmark = pytest.mark.family("chameleon")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chameleon")
    save(folder / "hf")
    assert main(["convert", "hf-to-megatron", "--hf", str(folder / "hf"), "--out", str(folder / "m")]) == 0
    return folder


def recipe_of(folder: Path, *words: str) -> Recipe:
    return load_recipe(
        folder / "m" / "recipe.yaml", ["data.train.0.path=x", "data.tokenizer=x", *words], expand_presets
    )


def test_codes_of_pixels_are_those_of_transformers_whoever_is_beside_them(converted: Path) -> None:
    """Of normalised pixels, and of bytes, which are normalised here; each picture alone and all together."""
    recipe = recipe_of(converted, "training.precision=fp32")
    processor = AutoImageProcessor.from_pretrained(converted / "hf", backend="pil")
    made = processor(photographs([(SIDE + number, 2 * SIDE) for number in range(6)]), return_tensors="pt")
    pixels = torch.as_tensor(made["pixel_values"])
    levels = ((pixels + 1) / FILES["rescale_factor"]).round().to(torch.uint8)
    with process_groups(recipe.parallel, 1), torch.no_grad():
        (chunk,) = build_model(recipe, IMAGE)
        load(converted / "m", modules=[unwrap(chunk)])
        expected = chameleon().model.get_image_tokens(pixels) - FIRST
        found = unwrap(chunk).vision(pixels)
        assert not any(one.requires_grad for one in unwrap(chunk).vision.parameters())
        assert torch.equal(found.squeeze(-1).T, expected) and len(expected.unique()) > 10
        assert torch.equal(unwrap(chunk).vision(levels), found)
        for number in range(6):
            assert torch.equal(unwrap(chunk).vision(pixels[number : number + 1]), found[:, number : number + 1])


def test_tokens_of_codes_in_any_order_are_those_of_transformers(tmp_path: Path) -> None:
    """Of pixels, and back to codes; what is written anew says the same order. Logits: test_whole.py."""
    save(tmp_path / "hf", mixed=True)
    assert main(["convert", "hf-to-megatron", "--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "m")]) == 0
    recipe, theirs = recipe_of(tmp_path, "training.precision=fp32"), chameleon(mixed=True).model
    pixels = torch.rand(6, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with process_groups(recipe.parallel, 1), torch.no_grad():
        (chunk,) = build_model(recipe, IMAGE)
        load(tmp_path / "m", modules=[unwrap(chunk)])
        tokens = theirs.get_image_tokens(pixels)
        assert torch.equal(FIRST + unwrap(chunk).vision(pixels).squeeze(-1).T, tokens)
        mixed, plain = (
            encoder_digest(unwrap(chunk).vision, one) for one in (recipe.model, recipe_of(tmp_path, PLAIN).model)
        )
    assert mixed != plain  # codes in shards are of one order
    mapping = theirs.vocabulary_mapping
    codes = codes_of(tokens.numpy(), recipe.model)
    assert codes.tolist() == [[mapping.bpe2img[one] for one in row] for row in tokens.tolist()]
    assert (codes + FIRST != tokens.numpy()).any()
    written = FAMILIES["chameleon"].config(recipe.model, {"image": IMAGE})["vocabulary_map"]
    assert written == theirs.config.vocabulary_map


def test_codes_are_written_in_their_slots_alone() -> None:
    fusion = Codes(FIRST, IMAGE)
    codes = fusion.arranged(torch.tensor([[[3], [1]], [[2], [0]]]), None, None)
    tokens = torch.tensor([[7, IMAGE, IMAGE, 8, IMAGE, IMAGE]])
    written = fusion.written(tokens, codes)
    assert written.tolist() == [[7, FIRST + 3, FIRST + 2, 8, FIRST + 1, FIRST]]
    assert fusion.written(tokens, None) is tokens
    with pytest.raises(RuntimeError, match="there are not 2 image slots"):
        fusion.written(tokens, codes[:2])


def test_the_planner_counts_the_tower(converted: Path) -> None:
    """Parameters one by one; operations are in test_whole.py."""
    vision = recipe_of(converted).model.vision
    ours = sorted(one.elements for one in cost.parameters(vision, 4))
    theirs = chameleon().model.vqmodel.named_parameters()
    assert ours == sorted(p.numel() for name, p in theirs if "post_quant_conv" not in name)
    assert all(one.fixed for one in cost.parameters(vision, 1))
    shown, kernels = Pictures.alike(3, vision.grid), Kernels(fused=False, number_bytes=4)
    assert cost.kept(vision, 1, shown, kernels) == 0
    assert cost.passing(vision, 1, shown, kernels, learns=True) > 3 * 3 * SIDE**2


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["model.connector={preset: linear}"], "takes features, and pictures of the tower"),
        (["model.language.image_tokens=[]"], "model.language.image_tokens: has 0 tokens"),
        (["model.language.image_tokens=[8]"], "are not the first of a run of tokens and the one behind its last"),
        (["modules.language.freeze=true"], "modules.language.freeze: pictures of the tower"),
        (["modules.vision.lr_multiplier=0.1"], "modules.vision.lr_multiplier: has no effect"),
        (["engine.fp8=hybrid"], "engine.fp8: does not go with model.language.image_tokens"),
        (["model.language.image_tokens=[4, 43]"], "has 39 tokens, and the tower 'chameleon_vq_gan' has 40 codes"),
        (
            ["model.language.image_tokens=[140, 180]"],
            "are not the first of a run of tokens and the one behind its last",
        ),
        (["model.vision={preset: clip_vit_l_14_336}"], "takes codes, and the tower 'clip_vit_l_14_336' gives features"),
        (["parallel.vision_placement=all_ranks"], "all_ranks sends features, and pictures of the tower"),
        (["model.language.pre_layernorms=false"], "goes with norms behind attention and MLP"),
        (["model.language.qk_layernorm=true"], "queries and keys have one norm"),
        (
            ["model.language.num_query_groups=2", "parallel.tensor_model_parallel_size=4"],
            "ranks share no key/value heads",
        ),
        (["model.vision.code_order=[1, 0]"], "code_order: is not each number from 0 to 39 (num_codes - 1) once"),
        (["loss.image_tokens=1", "model.image={kind: dynamic_tiles}"], "kind dynamic_tiles makes several views of a"),
        (
            ["loss.z_loss=1e-5", "engine.cross_entropy_loss_fusion=on", "training.precision=bf16"],
            "loss.z_loss has a loss",
        ),
        (["model.vision.base_width=40"], "base_width: 40 is not a multiple of 32"),
        (["model.vision.image_size=18"], "image_size: 18 is not a multiple of 4"),
        (
            ["model.vision.tensor_parallel=shard", "parallel.tensor_model_parallel_size=2"],
            "convolutions are whole on each of",
        ),
    ],
)
def test_what_does_not_go_with_codes_is_named(words: list[str], line: str, converted: Path) -> None:
    with pytest.raises(RecipeError) as raised:
        check_recipe(recipe_of(converted, *words))
    assert line in str(raised.value)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("config.json", {"attention_bias": True}, "attention_bias is True"),
        ("config.json", {"vocabulary_map": [1]}, "vocabulary_map is '[1]'; it must be an object"),
        ("config.json", {"vocabulary_map": {"<image>": IMAGE}}, "vocabulary_map has no image tokens (IMGIMGAZ, ..)"),
        (
            "config.json",
            {"vocabulary_map": {**NAMES, "IMGIMGDZ": 9}},
            "gives its 40 image tokens numbers from 9 to 159; they must be a run of tokens",
        ),
        (
            "config.json",
            {"vocabulary_map": {**NAMES, "IMGIMGDZ": "9"}},
            "code 3 of pictures, the token 9; the 40 image",
        ),
        ("config.json", {"vocabulary_map": {**NAMES, "IMGIMGDZ": FIRST}}, "with no other between them and none twice"),
        (
            "config.json",
            {"vocabulary_map": {name: token for name, token in NAMES.items() if token < FIRST + CODES - 1}},
            "has 39 image tokens, and vq_config 40 codes",
        ),
        ("config.json", {"vq_config": {"double_latent": True}}, "double_latent is True"),
        ("config.json", {"vq_config": {"attn_resolutions": [8]}}, "attn_resolutions is [8]; attention between"),
        ("preprocessor_config.json", {"rescale_factor": 1 / 255}, "rescale_factor is"),
        ("preprocessor_config.json", {"image_mean": [0.5] * 3}, "image_mean is [0.5, 0.5, 0.5]"),
        (
            "preprocessor_config.json",
            {"size": {"shortest_edge": 20}},
            "size is {'shortest_edge': 20}, but config.json's",
        ),
    ],
)
def test_bad_input_is_named(
    name: str, change: dict[str, Any], words: str, tmp_path: Path, converted: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    hf = tmp_path / "hf"
    hf.mkdir()
    for path in (converted / "hf").iterdir():
        (hf / path.name).hardlink_to(path) if path.name != name else None
    tree = json.loads((converted / "hf" / name).read_text())
    inner = {key: tree[key] | value if key == "vq_config" else value for key, value in change.items()}
    (hf / name).write_text(json.dumps(tree | inner))
    assert main(["convert", "hf-to-megatron", "--hf", str(hf), "--out", str(tmp_path / "m")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "m").exists()


@pytest.mark.dist
@pytest.mark.long
def test_trained_saved_resumed_and_exported_at_two_layouts(tmp_path: Path) -> None:
    """The tower stays as it was, whole on each rank; optimizer states are of the language model alone."""
    rows, side = 600, 32
    model = {
        "preset": None,
        "vision": {
            "preset": "chameleon_vq_gan", "image_size": side, "base_width": 32, "width_multipliers": (1, 1, 2),
            "blocks_per_level": 1, "latent_width": 16, "code_width": 8, "num_codes": 40,
        },
        "connector": {"preset": "codes"},
        "language": {
            "preset": "chameleon_34b", "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96,
            "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16, "vocab_size": rows, "vocab_divisor": 1,
            "max_position_embeddings": 2048, "init_method_std": 0.1, "image_tokens": (550, 590),
        },
        "image": {"kind": "crop", "resample": "lanczos"},
    }  # fmt: skip
    pp2 = {"pipeline_model_parallel_size": 2}
    both = {**pp2, "tensor_model_parallel_size": 2, "sequence_parallel": True}
    here, there = ({"model": model, "parallel": layout, "training": {"precision": "bf16"}} for layout in (both, pp2))
    one, again, other = (tmp_path / name for name in ("one", "again", "other"))
    first, half, last = "step-00000001", "step-00000002", "step-00000003"
    todo = [
        (here, str(one), None, (1, 2, 3)),
        (here, str(again), str(one / half), (3,)),
        (there, str(other), str(one / half), (2,)),
    ]
    losses, resumed, _ = ranks.run("run_cases:jobs", todo, world=4)[-1]
    assert resumed == losses[-1:]
    assert alike(again / last, one / last, rows) and tensors(other / half, rows) == tensors(one / half, rows)
    before, after = (tensors(one / step, rows) for step in (first, last))
    own = {key for key in before if "vision." in key}
    assert own and not any(key.startswith("optimizer") for key in own)
    assert all(before[key] == after[key] for key in own)
    masters = [key for key in before if key.startswith("optimizer.state.exp_avg.")]
    assert masters and all(before[key] != after[key] for key in masters)
    for checkpoint, out in ((one / half, "hf-one"), (other / half, "hf-other")):
        assert main(["convert", "megatron-to-hf", "--megatron", str(checkpoint), "--out", str(tmp_path / out)]) == 0
    found = [load_file(tmp_path / out / "model.safetensors") for out in ("hf-one", "hf-other")]
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())
    read = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf-one", dtype=torch.bfloat16)
    weight = read.state_dict()["model.layers.3.self_attn.q_norm.bias"]
    assert weight.shape == (4, 16) and torch.equal(weight, found[0]["model.layers.3.self_attn.q_norm.bias"])
