"""MiniCPM-V: slices as published, positions of its towers, what is refused, files after a training.

What it computes is in test_whole.py; weights there and back are in test_round_trips.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from minicpm_v_models import MINICPM_V, PATCH, MiniCPMLlama3V25, MiniCPMV2, cut
from native_cases import convert, merged
from test_qwen2_vl_sizes import model_of
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionEmbeddings

from megavlm.architectures.towers.packed_vit import geometry
from megavlm.cli import main
from megavlm.config.errors import UserError
from megavlm.data.decode import PilDecoder
from megavlm.data.media import arrange, plan_of
from megavlm.data.patches import pictures_of
from megavlm.data.plans_slices import SlicesPlan
from megavlm.data.render import render
from megavlm.families.known import FAMILIES
from megavlm.planning.workload import assume_workload
from megavlm.weights.source import Source

pytestmark = pytest.mark.family("minicpm_v", "minicpm_v_2", "minicpm_llama3_v_2_5")


def sizes(count: int) -> list[tuple[int, int]]:
    """Widths and heights of all proportions; borders between numbers of slices."""
    rng, found = random.Random(17), [(1, 1), (448, 448), (449, 448), (1344, 1344), (1, 300), (300, 1), (5000, 60)]
    while len(found) < count:
        area, ratio = math.exp(rng.uniform(4, 16)), math.exp(rng.gauss(0, 0.9))
        found.append((max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))))
    return found


@pytest.mark.parametrize(("most", "side", "patch"), [(9, 448, 14), (4, 448, 14), (9, 336, 16)])
def test_slices_are_those_of_the_published_rule(most: int, side: int, patch: int) -> None:
    """Sizes, grids, tokens and markup of 500 pictures, from width and height alone."""
    plan = SlicesPlan(side, 96, max_tiles=most, multiple=patch)
    for width, height in sizes(500):
        overview, grid, size = cut(width, height, most, side, patch)
        layout = plan.plan(width, height)
        columns, rows = grid or (0, 0)
        wanted = [overview] + [size] * (columns * rows)
        assert [view.box.size for view in layout.views] == wanted
        assert layout.grids == tuple((1, tall // patch, wide // patch) for wide, tall in wanted)
        assert layout.tokens == 96 * len(wanted) and plan.features_of(layout) == layout.tokens
        assert plan.pixels_of(layout) == (sum(w * h for w, h in wanted) // patch**2, 3 * patch**2)
        marks = "".join(run if isinstance(run, str) else "#" for run in layout.runs)
        one, line = "<image>#</image>", "\n"
        assert marks == one + (f"<slice>{line.join([one * columns] * rows)}</slice>" if grid else "")
        assert arrange(plan, [layout]).grid.tolist() == [list(one) for one in layout.grids]  # type: ignore[union-attr]


def test_decoded_patches_are_the_slices(tmp_path: Path) -> None:
    """In the order of their rows and columns, one slice after the other; a picture that is broken is gray."""
    from PIL import Image

    path = tmp_path / "a.png"
    Image.effect_noise((90, 61), 90).convert("RGB").save(path)
    plan = SlicesPlan(28, 6, multiple=7)
    layouts = [plan.plan(90, 61), plan.plan(30, 12)]
    decoded = PilDecoder().decode([path.read_bytes(), b"none"], plan, layouts)
    assert len(layouts[0].views) == 9 and decoded.failed == [1]
    first = plan.pixels_of(layouts[0])[0]
    views = list(pictures_of(decoded.pixels[:first], layouts[0].grids, plan))
    for ours, theirs in zip(views, render(path.read_bytes(), plan), strict=True):
        assert torch.equal(ours, torch.from_numpy(theirs).permute(2, 0, 1))
    assert (decoded.pixels[first:] == 128).all() and len(decoded.pixels) == first + plan.pixels_of(layouts[1])[0]


def test_buckets_are_those_of_idefics2() -> None:
    """Of every number of rows; in a line as its tower takes them where it is told of one row."""
    for side in (70, 6):
        config = SimpleNamespace(hidden_size=1, image_size=side, patch_size=1, num_channels=3)
        theirs = Idefics2VisionEmbeddings(config)
        with torch.no_grad():
            theirs.patch_embedding.weight.zero_()
            theirs.patch_embedding.bias.zero_()
            theirs.position_embedding.weight.copy_(torch.arange(side**2)[:, None])
        for rows, columns in [(1, n) for n in range(1, 1300, 7)] + [(n, 71 - n) for n in range(1, 71)]:
            mask = torch.ones(1, rows, columns, dtype=torch.bool)
            wanted = theirs(torch.zeros(1, 3, rows, columns), mask).flatten().long()
            found = geometry.taps([(1, rows, columns)], 1, side, "bucketed")
            assert np.array_equal(found.index[:, 0], wanted.numpy()), (rows, columns)
        line = geometry.taps([(1, 24, 43), (1, 2, 3)], 1, side, "bucketed_line").index[:, 0]
        for part, count in ((line[: 24 * 43], 24 * 43), (line[24 * 43 :], 6)):
            mask = torch.ones(1, 1, count, dtype=torch.bool)
            assert np.array_equal(part, theirs(torch.zeros(1, 3, 1, count), mask).flatten().long().numpy())


@pytest.mark.parametrize("side", [27, 3])
def test_a_table_is_resized_as_timm_does(side: int) -> None:
    """Both ways: to more rows, and to fewer over as many as there are."""
    for length in (1, 2, 5, 24, 27, 32, 43, 205):
        unit = torch.eye(side).view(1, side, side, 1).repeat(1, 1, 1, 2)  # of one column torch mixes up the rows
        wanted = torch.nn.functional.interpolate(unit, (length, 2), mode="bicubic", antialias=True)[0, :, :, 0].T
        assert torch.allclose(torch.from_numpy(geometry.antialiased(length, side)), wanted, atol=2e-6), length


def test_plans_reckon_with_slices() -> None:
    """A picture of 1024 x 768 is an overview and four slices, each by itself."""
    model = model_of("minicpm_llama3_v_2_5")
    from megavlm.config.load import load_recipe
    from megavlm.families.presets import expand_presets

    recipe = load_recipe("minicpm_llama3_v_2_5/sft", [], expand_presets)
    load = assume_workload(recipe, images_per_pack=1)
    grids = plan_of(model).plan(1024, 768).grids
    assert load.pictures is not None and len(grids) == 5 and load.pictures.count == 5
    assert load.pictures.squared == sum((rows * columns) ** 2 for _, rows, columns in grids)
    assert plan_of(model).plan(1344, 1344).tokens == 10 * 96


@pytest.mark.parametrize("name", MINICPM_V)
def test_a_configuration_that_is_written_is_read_alike(name: str, tmp_path: Path) -> None:
    family = FAMILIES[MINICPM_V[name][0]]
    MINICPM_V[name][1](tmp_path / "hf")
    model = convert(tmp_path / "hf", tmp_path / "m").model
    assert family.refusal(model) is None
    before, path = family.branches(Source(tmp_path / "hf")), tmp_path / "hf" / "config.json"
    own, written = json.loads(path.read_text()), family.config(model, {})
    same = {"architectures", "auto_map", "model_type", "vocab_size", "query_num", "slice_mode", "tie_word_embeddings"}
    assert written.items() >= {key: own[key] for key in same & own.keys()}.items()
    path.write_text(json.dumps(written))
    assert family.branches(Source(tmp_path / "hf")) == before


def test_a_head_that_is_tied(tmp_path: Path) -> None:
    """A model of its own: MiniCPM-2B ties it, MiniCPM-V 2.0 does not."""
    MiniCPMV2(tied=True).save_pretrained(tmp_path / "hf")
    assert convert(tmp_path / "hf", tmp_path / "m").model.language.tie_word_embeddings


def test_files_after_a_training_say_how_pictures_are_cut(tmp_path: Path) -> None:
    """config.json and the processor's file: either alone would be refused."""
    MiniCPMLlama3V25().save_pretrained(tmp_path / "hf")
    family = FAMILIES["minicpm_llama3_v_2_5"]
    model = convert(tmp_path / "hf", tmp_path / "m").model
    told = family.pictures_of(dataclasses.replace(model, image=dataclasses.replace(model.image, max_tiles=4)))
    for name, keys in {"preprocessor_config.json": told.pop("preprocessor_config.json"), "config.json": told}.items():
        path = tmp_path / "hf" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    assert convert(tmp_path / "hf", tmp_path / "again").model.image.max_tiles == 4


@pytest.mark.parametrize(
    ("version", "file", "values", "said"),
    [
        (MiniCPMLlama3V25, "config.json", {"version": "2.6"}, "version is 2.6; of MiniCPM-V"),
        (MiniCPMLlama3V25, "config.json", {"vision_config": {"hidden_act": "gelu"}}, "hidden_act is 'gelu'"),
        (MiniCPMLlama3V25, "config.json", {"query_num": 5}, "query_num is 5, but resampler.query has 6 rows"),
        (MiniCPMLlama3V25, "config.json", {"slice_mode": False}, "slice_mode is False"),
        (MiniCPMLlama3V25, "config.json", {"patch_size": 14}, "patch_size is 14"),
        (MiniCPMLlama3V25, "config.json", {"slice_config": {"patch_size": 14}}, "slice_config: patch_size is 14"),
        (MiniCPMLlama3V25, "preprocessor_config.json", {"max_slice_nums": 4}, "max_slice_nums is 4, but config.json"),
        (MiniCPMLlama3V25, "preprocessor_config.json", {"norm_mean": [0.4] * 3}, "norm_mean is [0.4"),
        (MiniCPMV2, "config.json", {"vision_encoder": "vit_large"}, "vision_encoder is 'vit_large'"),
        (MiniCPMV2, "config.json", {"patch_size": 14}, "patch_size is 14, but the patches of vpm.patch_embed are 7"),
        (MiniCPMV2, "config.json", {"drop_vision_last_layer": False}, "is False, but vpm.blocks has 3 of the tower"),
        (MiniCPMV2, "config.json", {"use_mup": False}, "use_mup is False"),
        (MiniCPMV2, "config.json", {"num_hidden_layers": 3}, "layers.3"),
    ],
)
def test_what_is_not_supported_is_said(
    version: Any, file: str, values: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version().save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / file
    path.write_text(json.dumps(merged(json.loads(path.read_text()), values)))
    assert main(["convert", "hf-to-megatron", "--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "m")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_other_models_are_refused() -> None:
    model = model_of("minicpm_llama3_v_2_5")
    for part, keys, said in (
        ("vision", {"positional_interpolation": "bucketed"}, "positional_interpolation 'bucketed'"),
        ("vision", {"image_mean": (0.4, 0.4, 0.4)}, "image_mean"),
        ("connector", {"head_dim": 64}, "heads are 64 wide"),
        ("language", {"add_qkv_bias": True}, "add_qkv_bias"),
        ("image", {"slice_markup": "flat"}, "slices (flat, bicubic)"),
    ):
        other = dataclasses.replace(model, **{part: dataclasses.replace(getattr(model, part), **keys)})
        assert said in str(FAMILIES["minicpm_llama3_v_2_5"].refusal(other)), part
    assert "the tower has" in str(FAMILIES["minicpm_v_2"].refusal(model))


def test_plans_and_towers_that_do_not_go_together() -> None:
    model = model_of("minicpm_llama3_v_2_5")
    merger = dataclasses.replace(model_of("qwen2_vl_2b").connector)
    for changed, said in (
        ({"vision": model_of("llava_1_5_7b").vision}, "takes squares only"),
        ({"connector": merger}, "take resampler_2d"),
        ({"vision": dataclasses.replace(model.vision, spatial_merge_size=2)}, "single patches"),
    ):
        with pytest.raises(UserError, match=said):
            plan_of(dataclasses.replace(model, **changed))
    with pytest.raises(UserError, match="no rows and columns"):
        plan_of(model).token_grids(plan_of(model).plan(448, 448))
    assert PATCH == 7
