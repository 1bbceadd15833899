"""Connectors that shrink or widen tokens equal plain torch modules, on one rank; test_tensor_parallel.py has two."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import reducer_reference as published
import torch
from pydantic import TypeAdapter
from reducer_cases import (
    CASES,
    EMBED,
    IMAGES,
    WIDTH,
    Case,
    build,
    canonical,
    compare,
    features,
    model_of,
    reference_of,
)
from saved_tensors import saved_tensors
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megavlm.architectures.context import BuildContext
from megavlm.architectures.cost import Kernels, Pictures, cost_of
from megavlm.config.architecture import architecture_of
from megavlm.config.errors import UserError
from megavlm.config.schema import ModelConfig, ParallelConfig
from megavlm.data.media import feature_side, plan_of
from megavlm.families.presets import expand_presets

# Keys that no published form has.
OTHER: dict[str, Case] = {
    kind: CASES[case]._replace(connector={**CASES[case].connector, **more})
    for kind, case, more in (
        ("mean-rms", "average-pool", {"normalization": "RMSNorm", "depth": 3}),
        ("mean-layer-norm", "average-pool", {"normalization": "LayerNorm"}),
        ("no-blocks", "c-abstractor", {"num_blocks": 0, "position_embedding": False, "mlp_depth": 3}),
        ("three-groups", "dense-dci-odd", {"streams": 3, "depth": 1}),
    )
}


@pytest.mark.parametrize("name", CASES)
def test_a_connector_equals_its_reference(name: str) -> None:
    got = compare(name)
    assert got.shape == (CASES[name].tokens, IMAGES, EMBED)
    assert model_of(name).tokens_per_view == CASES[name].tokens


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("name", [*CASES, *OTHER])
def test_costs_are_what_torch_counts_and_keeps(name: str, learns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations and parameters exactly, kept bytes within 2 %."""
    monkeypatch.setattr("reducer_cases.CASES", {**CASES, **OTHER})
    model, connector, x = model_of(name), build(name).requires_grad_(learns), features(name)
    shown, counted = Pictures(IMAGES, IMAGES * model.vision.patches_per_image, 0), cost_of(model, "connector")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        connector(x)
    queries = getattr(model.connector, "num_queries", None) or 0
    once = 2 * queries * EMBED**2  # their projection, the same for all pictures
    if name.startswith("q-former"):  # of the first layer: attention to each other, and the projection for the next one
        once = 2 * queries * 5 * 32**2 + 4 * queries**2 * 32
    assert counted.work(model, shown).total == counter.get_total_flops() - once > 0
    elements = sorted(one.elements for one in counted.parameters(model, 1))
    assert elements == sorted(p.numel() for p in connector.parameters())
    with saved_tensors(connector.parameters()) as saved:
        connector(x)
    plain = Kernels(fused=False, number_bytes=4)
    assert counted.kept(model, 1, shown, plain, learns=learns) == pytest.approx(saved.bytes, rel=0.02)


def test_the_last_layer_of_a_q_former_may_learn_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients, the input's, and what is kept are right; the rest is counted as fixed."""
    alone = CASES["q-former"]._replace(connector={**CASES["q-former"].connector, "trained": "projection"})
    monkeypatch.setattr("reducer_cases.CASES", {"alone": alone})
    compare("alone")
    model, connector = model_of("alone"), build("alone")
    fixed = [one.elements for one in cost_of(model, "connector").parameters(model, 1) if one.fixed]
    assert sorted(fixed) == sorted(p.numel() for p in connector.parameters() if not p.requires_grad)
    assert {name for name, p in connector.named_parameters() if p.requires_grad} == {"layers.0.weight", "layers.0.bias"}
    with saved_tensors(connector.parameters()) as saved:
        connector(features("alone"))
    shown, plain = Pictures(IMAGES, IMAGES * 16, 0), Kernels(fused=False, number_bytes=4)
    kept = cost_of(model, "connector").kept(model, 1, shown, plain, learns=True)
    assert kept == pytest.approx(saved.bytes, rel=0.02)


# Of the checkpoints, or of the papers where they name one: MobileVLM V2's (arXiv 2402.03766), which compares
# connectors of the 1.7B, has 18.94M for version 1 and 6.32M for version 2.
SIZES: dict[str, tuple[dict[str, Any], str, str, int]] = {
    "minigpt-v2": ({"preset": "concat_row"}, "wide", "llama2_7b", 5632 * 4096 + 4096),
    "gemma-3-4b": ({"preset": "gemma3_pool"}, "siglip_so400m_14_384", "gemma_3_4b", 1152 + 1152 * 2560),
    "mobilevlm-1.7b": ({"preset": "ldpnet"}, "clip_vit_l_14_336", "tinyllama_1_1b", 18_936_832),
    "mobilevlm-v2-1.7b": ({"preset": "ldpnetv2"}, "clip_vit_l_14_336", "tinyllama_1_1b", 6_316_032),
    "denseconnector-7b": ({"preset": "dense_dci"}, "clip_vit_l_14_336", "llama2_7b", 3072 * 4096 + 4096**2 + 2 * 4096),
    "denseconnector-siglip": (
        {"preset": "dense_dci"}, "siglip_so400m_14_384", "llama2_7b", 3456 * 4096 + 4096**2 + 2 * 4096
    ),
    "denseconnector-sti": ({"preset": "dense_sti"}, "clip_vit_l_14_336", "llama2_7b", 1024 * 4096 + 4096**2 + 2 * 4096),
    "honeybee-7b": ({"preset": "c_abstractor"}, "clip_vit_l_14_336", "llama2_7b", 0),
    "minigpt-4": ({"preset": "q_former"}, "eva01_clip_g_14_224", "llama2_7b", 0),
}  # fmt: skip
WIDE = {"preset": "clip_vit_l_14_336", "image_size": 448, "hidden_size": 1408, "num_attention_heads": 16}
SIGLIP = {"num_layers": 26, "post_layernorm": False, "feature_layers": tuple(range(27))}


@pytest.mark.parametrize("name", SIZES)
def test_presets_have_the_published_sizes(name: str) -> None:
    """Counted by the cost, which the test above holds against real modules."""
    connector, tower, language, expected = SIZES[name]
    vision: dict[str, Any] = WIDE if tower == "wide" else {"preset": tower}
    if name == "gemma-3-4b":
        vision |= {"image_size": 896}
    if name == "denseconnector-siglip":
        vision |= SIGLIP
    elif name.startswith("denseconnector"):
        vision |= {"feature_layers": (23, 7, 15) if "sti" in name else tuple(range(24))}
    tree = {"vision": vision, "connector": connector, "language": {"preset": language}}
    model = whole(tree)
    if name == "honeybee-7b":
        with torch.device("meta"):
            expected = sum(p.numel() for p in published.CAbstractor(1024, 4096, 576, 1024, 3, 12).parameters())
    if name == "minigpt-4":
        with torch.device("meta"):
            expected = sum(p.numel() for p in published.QFormer(1408, 4096, 32).parameters())
    assert sum(one.elements for one in cost_of(model, "connector").parameters(model, 1)) == expected
    assert not list(architecture_of(model, "connector").rules(model, ParallelConfig()))
    assert model.tokens_per_view == TOKENS[name]


TOKENS = {
    "minigpt-v2": 256, "gemma-3-4b": 256, "mobilevlm-1.7b": 144, "mobilevlm-v2-1.7b": 144, "denseconnector-7b": 576,
    "denseconnector-siglip": 729, "denseconnector-sti": 720, "honeybee-7b": 144,
    "minigpt-4": 32,
}  # fmt: skip


def whole(tree: dict[str, Any]) -> ModelConfig:
    return TypeAdapter(ModelConfig).validate_python(expand_presets({"model": {"preset": None, **tree}})["model"])


FIVE = {"image_size": 40}
BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any], int, str]] = {
    "row": ({"preset": "concat_row", "patches": 3}, {}, 1, "patches: 3 does not divide the 16 patches"),
    "no square": (
        {"preset": "average_pool", "patches": 6}, {}, 1,
        "patches: 6 is not a square number, which .*mean needs; take 4 or 9",
    ),
    "grid": ({"preset": "concat_square"}, FIVE, 1, "patches: squares of 2 x 2 do not fill the 5 x 5 patches"),
    "centre without norm": (
        {"preset": "average_pool", "layernorm_zero_centered_gamma": True}, {}, 1,
        "layernorm_zero_centered_gamma: goes with",
    ),
    "version 1 with a grid": ({"preset": "ldpnet", "output_grid": 2}, {}, 1, "output_grid: version 1 halves"),
    "version 2 without": ({"preset": "ldpnetv2", "output_grid": None}, {}, 1, "output_grid: version 2 needs it"),
    "version 2 too large": ({"preset": "ldpnetv2"}, {}, 1, "output_grid: 12 is more than the 4 x 4 patches"),
    "abstractor too large": ({"preset": "c_abstractor"}, {}, 1, "output_grid: 12 is more than the 4 x 4 patches"),
    "abstractor's gate": (
        {"preset": "c_abstractor", "output_grid": 2, "hidden_size": 36}, {}, 4,
        "hidden_size 36, a quarter of it: 9 is not",
    ),
    "ldp's width": ({"preset": "ldpnet"}, {"embed": 60}, 1, "hidden_size: 60 is not divisible by 8, as MobileNet"),
    "dci without layers": ({"preset": "dense_dci"}, {}, 1, r"feature_layers: null; .* needs all, \[0, 1, .., 2\]"),
    "dci with a gap": (
        {"preset": "dense_dci"}, {"feature_layers": (0, 2)}, 1, r"feature_layers: \[0, 2\]; .* needs all"
    ),
    "sci with two": ({"preset": "dense_sci"}, {"feature_layers": (2, 1)}, 1, "feature_layers: 2 layers; .* needs 3"),
    "more groups than layers": (
        {"preset": "dense_dci", "streams": 4}, {"feature_layers": (0, 1, 2)}, 1, "streams: 4 groups are more than"
    ),
    "queries": (
        {"preset": "minicpm_v_2_resampler", "num_queries": 6, "head_dim": 16}, {}, 1,
        "num_queries: 6 is not a square number, which model.connector.query_positions needs; take 4 or 9",
    ),
    "heads": ({"preset": "resampler_2d", "head_dim": 32}, {}, 4, "head_dim: gives 2 heads, not divisible by"),
    "q-former's heads": ({"preset": "q_former"}, {}, 8, "num_attention_heads: 12 is not divisible by"),
    "pool": (
        {"preset": "dense_sti", "pool": 17}, {"feature_layers": (2, 0, 1)}, 1, "pool: 17 are more than the tower's 16"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_go_together_is_named(name: str) -> None:
    connector, changed, ranks, line = BROKEN[name]
    vision = {"preset": "tiny_vit", "image_size": 32, "num_layers": 2} | changed
    embed = vision.pop("embed", 64)
    model = whole({"vision": vision, "connector": connector, "language": {"preset": "tiny_qwen", "hidden_size": embed}})
    layout = ParallelConfig(tensor_model_parallel_size=ranks)
    (found,) = architecture_of(model, "connector").rules(model, layout)
    assert re.search(line, found), found
    assert found.startswith("model.") and "; " in found


@pytest.mark.parametrize("name", CASES)
def test_cases_break_no_rule(name: str) -> None:
    model = model_of(name)
    assert not list(architecture_of(model, "connector").rules(model, ParallelConfig(tensor_model_parallel_size=2)))


SHOWN = [(1, 4, 6), (1, 2, 2), (2, 4, 4), (1, 6, 2)]
"""Frames, rows and columns of pictures in front of a tower whose blocks are 2 x 2."""
PACKED_TOWER = {"preset": "qwen2_5_vl_vit", "hidden_size": 48, "num_layers": 1, "num_attention_heads": 3} | {
    "image_size": 56, "ffn_hidden_size": 64, "full_attention_layers": [0]
}  # fmt: skip


def packed_model(connector: dict[str, Any], **more: Any) -> ModelConfig:
    """Return a model of a tower of pictures of any size."""
    language = {"preset": "tiny_qwen", "hidden_size": EMBED}
    return whole({"vision": PACKED_TOWER, "connector": connector, "language": language, **more})


@pytest.mark.parametrize("equal", [False, True])
def test_pictures_of_any_size_are_looked_at_together(equal: bool) -> None:
    """Features in the tower's blocks; the reference gets them row by row, filled up, with a mask of its keys."""
    model = packed_model({"preset": "resampler_2d", "num_queries": 6, "head_dim": 16})
    connector = architecture_of(model, "connector").make(model, BuildContext(ParallelConfig()))
    reference = reference_of("resampler-2d")
    with torch.no_grad():
        for key, one in canonical("resampler-2d", reference.named(), connector).items():
            connector.get_parameter(key).copy_(one)
    grids = [(1, 4, 6)] * 3 if equal else SHOWN
    sizes = [(rows, columns) for frames, rows, columns in grids for _ in range(frames)]
    longest = max(rows * columns for rows, columns in sizes)
    generator = torch.Generator().manual_seed(3)
    filled_PNW = torch.randn(longest, len(sizes), WIDTH, generator=generator).requires_grad_()
    reference.inner.sizes = sizes
    blocks = []
    for i, (rows, columns) in enumerate(sizes):
        picture = filled_PNW[: rows * columns, i].unflatten(0, (rows // 2, 2, columns // 2, 2))
        blocks.append(picture.transpose(1, 2).reshape(rows * columns, WIDTH))
    x = torch.cat(blocks).unsqueeze(1).detach().requires_grad_()
    got, expected_QNE = connector(x, torch.tensor(grids)), reference(filled_PNW)
    expected = expected_QNE.transpose(0, 1).flatten(0, 1).unsqueeze(1)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert connector.rows_of(torch.tensor(grids)) == [6 * frames for frames, _, _ in grids]
    weights = torch.randn(got.shape, generator=generator)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {key: one.grad for key, one in reference.named().items()}
    for key, gradient in canonical("resampler-2d", gradients, connector).items():
        torch.testing.assert_close(connector.get_parameter(key).grad, gradient, rtol=1e-4, atol=1e-4)
    # What the mask hides has no part in it.
    assert filled_PNW.grad is not None
    hidden = [filled_PNW.grad[rows * columns :, i] for i, (rows, columns) in enumerate(sizes)]
    assert all(not one.any() for one in hidden)
    assert torch.allclose(x.grad.sum(0)[0], filled_PNW.grad.sum((0, 1)), atol=1e-3)


def test_a_plan_of_queries_has_as_many_tokens_for_every_picture() -> None:
    model = packed_model({"preset": "resampler_2d", "head_dim": 16}, image={"kind": "native"})
    plan = plan_of(model)
    for width, height in ((56, 56), (640, 200), (1000, 1000)):
        layout = plan.plan(width, height)
        assert layout.runs == (96,) and plan.features_of(layout) == 96
        assert layout.patches is not None and plan.pixels_of(layout)[0] == math.prod(layout.patches)
        with pytest.raises(UserError, match="no rows and columns"):
            plan.token_grids(layout)
    model = packed_model({"preset": "resampler_2d", "head_dim": 16}, video={"kind": "qwen2_vl"})
    (line,) = architecture_of(model, "connector").rules(model, ParallelConfig())
    assert line.startswith("model.video.kind: qwen2_vl counts a token for each block"), line


@pytest.mark.parametrize(
    ("connector", "vision", "spatial"),
    [
        ({"preset": "concat_row"}, {}, False), ({"preset": "concat_square"}, {}, True),
        ({"preset": "ldpnet"}, {}, True),
        ({"preset": "dense_sti"}, {"feature_layers": (2, 0, 1)}, False), ({"preset": "resampler"}, {}, False),
        ({"preset": "q_former"}, {}, False),
    ],
)  # fmt: skip
def test_tiles_are_put_together_only_where_tokens_lie_as_patches_do(
    connector: dict[str, Any], vision: dict[str, Any], spatial: bool
) -> None:
    tower = {"preset": "tiny_vit", "image_size": 32, "num_layers": 2, **vision}
    model = whole({"vision": tower, "connector": connector, "language": {"preset": "tiny_qwen", "hidden_size": 64}})
    assert model.connector.spatial == spatial
    if spatial:
        assert feature_side(model, "anyres") ** 2 == model.tokens_per_view
    else:
        with pytest.raises(UserError, match="does not keep them where their patches are"):
            feature_side(model, "anyres")
