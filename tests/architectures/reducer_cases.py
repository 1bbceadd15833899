"""Compare connectors that shrink or widen tokens with their references, at any tensor-parallel size.

Weights and gradients go from the published names to ours by the connectors' own tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import reducer_reference as published
import torch
from samples import recipe
from torch import Tensor, nn

from megavlm.architectures.connectors.c_abstractor.tables import C_ABSTRACTOR
from megavlm.architectures.connectors.dense_connector.tables import DENSE_PROJECTOR
from megavlm.architectures.connectors.ldp.tables import LDP, LDP_V2
from megavlm.architectures.connectors.patch_reducer.tables import (
    GEMMA3_PROJECTOR,
    IDEFICS3_CONNECTOR,
    MINIGPT_PROJECTION,
)
from megavlm.architectures.connectors.q_former.tables import BLIP2_Q_FORMER
from megavlm.architectures.connectors.resampler_2d.tables import MINICPM_RESAMPLER
from megavlm.config.architecture import CONNECTORS
from megavlm.config.schema import ModelConfig, Recipe
from megavlm.models.build import build_context
from megavlm.weights.rules import Heads, Table, both

IMAGES, WIDTH, EMBED = 3, 48, 64


class Case(NamedTuple):
    """A connector and its reference."""

    connector: dict[str, Any]
    reference: Callable[[], nn.Module]
    table: Table
    tokens: int
    prefix: str = ""
    patches: int = 16
    layers: tuple[int, ...] | None = None
    """``model.vision.feature_layers``; the last one is the tower's number of layers."""
    class_feature: bool = False
    """A feature more in front."""


_PLAIN = Table(part="connector", rest=(*both("layers.0", "mlp.0"), *both("layers.1", "mlp.2")))
_DENSE = "model.mm_projector."
_Q_FORMER = {"preset": "q_former", "num_queries": 5, "num_layers": 3, "hidden_size": 32, "num_attention_heads": 4} | {
    "ffn_hidden_size": 56
}  # fmt: skip


def _q_former(frequency: int, layers: int) -> nn.Module:
    return published.QFormer(
        WIDTH, EMBED, 5, num_hidden_layers=layers, hidden_size=32, num_attention_heads=4, intermediate_size=56,
        cross_attention_frequency=frequency,
    )  # fmt: skip


_TWO_LAYERS = dataclasses.replace(
    BLIP2_Q_FORMER, rest=(*BLIP2_Q_FORMER.rest, *both("layers.1", "language_projection2"))
)
_ABSTRACTOR = {"preset": "c_abstractor", "output_grid": 2, "hidden_size": 32}
CASES: dict[str, Case] = {
    "concat-row": Case(
        {"preset": "concat_row"}, lambda: published.RowConcat(WIDTH, EMBED, 4), MINIGPT_PROJECTION, tokens=4
    ),
    "concat-row-of-8": Case(
        {"preset": "concat_row", "patches": 8}, lambda: published.RowConcat(WIDTH, EMBED, 8), MINIGPT_PROJECTION, 2
    ),
    "concat-square": Case(
        {"preset": "concat_square", "add_bias_linear": False}, lambda: published.idefics3(WIDTH, EMBED, 2),
        IDEFICS3_CONNECTOR, 4, "model.connector.",
    ),
    "concat-square-of-9": Case(
        {"preset": "concat_square", "patches": 9, "add_bias_linear": False},
        lambda: published.idefics3(WIDTH, EMBED, 3), IDEFICS3_CONNECTOR, 4, "model.connector.", patches=36,
    ),
    "average-pool": Case(
        {"preset": "average_pool", "depth": 2}, lambda: published.SquareMean(WIDTH, EMBED, 2), _PLAIN, 4
    ),
    "gemma3-pool": Case(
        {"preset": "gemma3_pool", "patches": 4}, lambda: published.gemma3(WIDTH, EMBED, 16, 2), GEMMA3_PROJECTOR, 4,
        "multi_modal_projector.",
    ),
    "ldp": Case(
        {"preset": "ldpnet"}, lambda: published.LDP(WIDTH, EMBED, 16), LDP, 4, "model.mm_projector.model."
    ),
    "ldp-odd": Case(
        {"preset": "ldpnet"}, lambda: published.LDP(WIDTH, EMBED, 16), LDP, 9, "model.mm_projector.model.", patches=25
    ),
    "ldpv2": Case(
        {"preset": "ldpnetv2", "output_grid": 2}, lambda: published.LDPv2(WIDTH, EMBED, 2), LDP_V2, 4,
        "model.mm_projector.",
    ),
    "ldpv2-overlapping": Case(
        {"preset": "ldpnetv2", "output_grid": 3}, lambda: published.LDPv2(WIDTH, EMBED, 3), LDP_V2, 9,
        "model.mm_projector.",
    ),
    "c-abstractor": Case(
        _ABSTRACTOR, lambda: published.CAbstractor(WIDTH, EMBED, 16, 32, 3, 2), C_ABSTRACTOR, 4, "abstractor."
    ),
    "c-abstractor-equal-width": Case(
        {**_ABSTRACTOR, "hidden_size": WIDTH, "num_blocks": 1, "output_grid": 3},
        lambda: published.CAbstractor(WIDTH, EMBED, 16, WIDTH, 1, 3), C_ABSTRACTOR, 9, "abstractor.",
    ),
    "dense-sti": Case(
        {"preset": "dense_sti"}, lambda: published.Dense(WIDTH, EMBED, "sti", 3),
        DENSE_PROJECTOR, 25 + 2 * 3, _DENSE, patches=25, layers=(3, 0, 1),
    ),
    "dense-sci": Case(
        {"preset": "dense_sci"}, lambda: published.Dense(WIDTH, EMBED, "sci", 3), DENSE_PROJECTOR, 16, _DENSE,
        layers=(3, 1, 2),
    ),
    "dense-dci-even": Case(
        {"preset": "dense_dci"}, lambda: published.Dense(WIDTH, EMBED, "dci", 4), DENSE_PROJECTOR, 16, _DENSE,
        layers=(0, 1, 2, 3),
    ),
    "dense-dci-odd": Case(
        {"preset": "dense_dci"}, lambda: published.Dense(WIDTH, EMBED, "dci", 5), DENSE_PROJECTOR, 16, _DENSE,
        layers=(0, 1, 2, 3, 4),
    ),
    "resampler-2d": Case(
        {"preset": "resampler_2d", "num_queries": 6, "head_dim": 16},
        lambda: published.Resampler(WIDTH, EMBED, 16, 6, positions=False), MINICPM_RESAMPLER, 6, "resampler.",
    ),
    "resampler-2d-query-positions": Case(
        {"preset": "minicpm_v_2_resampler", "num_queries": 4, "head_dim": 32},
        lambda: published.Resampler(WIDTH, EMBED, 32, 4, positions=True), MINICPM_RESAMPLER, 4, "resampler.",
    ),
    "q-former": Case(_Q_FORMER, lambda: _q_former(2, 3), BLIP2_Q_FORMER, 5),
    "q-former-two-layers": Case(
        {**_Q_FORMER, "projection_hidden_size": 24},
        lambda: published.TwoLayers(_q_former(2, 3), 32, 24, EMBED), _TWO_LAYERS, 5,
    ),
    "q-former-class-token": Case(
        {**_Q_FORMER, "num_layers": 2, "cross_attention_frequency": 1}, lambda: _q_former(1, 2), BLIP2_Q_FORMER, 5,
        class_feature=True,
    ),
}  # fmt: skip


def recipe_of(name: str, size: int = 1) -> Recipe:
    """Return a recipe whose tower makes what the case's connector takes."""
    case = CASES[name]
    side = int(case.patches**0.5)
    vision = {"image_size": 8 * side, "hidden_size": WIDTH}
    if case.class_feature:
        vision |= {"class_token": True, "class_feature": True}
    if case.layers is not None:
        vision |= {"feature_layers": case.layers, "num_layers": max(case.layers)}
    tree = {"preset": "tiny", "connector": case.connector, "vision": vision, "language": {"hidden_size": EMBED}}
    return recipe(model=tree, parallel={"tensor_model_parallel_size": size})


def model_of(name: str) -> ModelConfig:
    """Return the model of a case."""
    return recipe_of(name).model


def build(name: str, size: int = 1) -> nn.Module:
    """Return the connector of this rank."""
    made = recipe_of(name, size)
    built: nn.Module = CONNECTORS.find(made.model.connector.preset).build(made.model, build_context(made))
    return built


def features(name: str) -> Tensor:
    """Return [P, N, W] patch features, of all layers side by side."""
    case = CASES[name]
    shape = (case.patches + int(case.class_feature), IMAGES, WIDTH * len(case.layers or (0,)))
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).requires_grad_()


def reference_of(name: str) -> published.Named:
    """Return the reference with weights that are neither tiny nor at their defaults."""
    case = CASES[name]
    reference = published.Named(case.prefix, case.reference())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if parameter.dim() == 1:
                parameter += 0.5
    return reference


def canonical(name: str, tensors: dict[str, Tensor], ours: nn.Module) -> dict[str, Tensor]:
    """Return tensors of published names by the names of our parameters, whole."""
    slots = {f"connector.{key}": None for key, _ in ours.named_parameters()}
    found: dict[str, Tensor] = {}
    taken: set[str] = set()
    for rule in CASES[name].table.rules(slots, 0):
        values = rule.reshape.to_ours([tensors[one] for one in rule.theirs], Heads(0, 0, 0))
        back = rule.reshape.to_theirs(values, Heads(0, 0, 0))
        assert all(torch.equal(tensors[one], value) for one, value in zip(rule.theirs, back, strict=True))
        found |= {one.removeprefix("connector."): value for one, value in zip(rule.ours, values, strict=True)}
        taken |= set(rule.theirs)
    assert taken == set(tensors), taken ^ set(tensors)
    assert {f"connector.{key}" for key in found} == set(slots)
    return found


def part(whole: Tensor, parameter: Tensor, rank: int, size: int) -> Tensor:
    """Return this rank's part of what a parameter is as one process would have it."""
    if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return whole
    return whole.chunk(size, parameter.partition_dim)[rank]  # type: ignore[attr-defined]


def compare(name: str, size: int = 1, rank: int = 0) -> Tensor:
    """Compare output, the input's gradient, and those of all weights; return the output."""
    ours, reference = build(name, size), reference_of(name)
    whole = canonical(name, reference.named(), ours)
    with torch.no_grad():
        for key, parameter in ours.named_parameters():
            parameter.copy_(part(whole[key], parameter, rank, size))
    x, x_reference = features(name), features(name)
    got, expected = ours(x), reference(x_reference)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(8))
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, x_reference.grad, rtol=1e-4, atol=1e-4)
    gradients = {  # the fixed ones have none
        key: torch.zeros_like(one) if one.grad is None else one.grad for key, one in reference.named().items()
    }
    for key, gradient in canonical(name, gradients, ours).items():
        parameter = ours.get_parameter(key)
        if not parameter.requires_grad:
            assert parameter.grad is None, key
            continue
        assert parameter.grad is not None, key
        mine = part(gradient, parameter, rank, size)
        torch.testing.assert_close(parameter.grad, mine, rtol=1e-4, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
    return got
