"""The named reshapes, by hand on small tensors, and the rows of a table."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from megavlm.checkpoint.hf.shapes import find_aside, same_bits
from megavlm.weights.rules import (
    CONCAT,
    QKV,
    QKV_BLOCKS,
    SAME,
    SPLIT3,
    STACKED,
    STACKED_INPUTS_FIRST,
    TRANSPOSE,
    Aside,
    Heads,
    Reshape,
    Table,
    both,
    row,
)

GROUPED = Heads(heads=4, groups=2, dim=3)


def named(letter: str, heads: int, dim: int = 3) -> Tensor:
    """Rows whose value tells letter, head and row: 1000 for q, 2000 for k, 3000 for v."""
    base = {"q": 1000, "k": 2000, "v": 3000}[letter]
    return torch.tensor([float(base + 10 * head + i) for head in range(heads) for i in range(dim)])


def test_qkv_is_grouped_as_megatron_has_it() -> None:
    """Group 0: heads 0 and 1 with key and value 0; group 1: heads 2 and 3 with key and value 1."""
    q, k, v = named("q", 4), named("k", 2), named("v", 2)
    (fused,) = QKV.to_ours([q, k, v], GROUPED)
    first = [1000, 1001, 1002, 1010, 1011, 1012, 2000, 2001, 2002, 3000, 3001, 3002]
    second = [1020, 1021, 1022, 1030, 1031, 1032, 2010, 2011, 2012, 3010, 3011, 3012]
    assert fused.tolist() == first + second
    (same,) = QKV_BLOCKS.to_ours([torch.cat([q, k, v])], GROUPED)
    assert torch.equal(same, fused)


def test_gate_comes_first_and_three_are_three() -> None:
    gate, up = torch.full((2, 3), 1.0), torch.full((2, 3), 2.0)
    assert CONCAT.to_ours([gate, up], GROUPED)[0][:, 0].tolist() == [1, 1, 2, 2]
    parts = SPLIT3.to_ours([torch.arange(6.0)], GROUPED)
    assert [part.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert TRANSPOSE.to_ours([torch.arange(6.0).view(2, 3)], GROUPED)[0].shape == (3, 2)


CASES: list[tuple[Reshape, Heads, list[tuple[int, ...]]]] = [
    (SAME, GROUPED, [(3, 4)]),
    (TRANSPOSE, GROUPED, [(3, 4)]),
    (QKV, GROUPED, [(12, 5), (6, 5), (6, 5)]),
    (QKV, GROUPED, [(12,), (6,), (6,)]),
    (QKV, Heads(4, 4, 3), [(12, 5), (12, 5), (12, 5)]),
    (QKV, Heads(6, 1, 2), [(12, 5), (2, 5), (2, 5)]),
    (QKV_BLOCKS, GROUPED, [(24, 5)]),
    (QKV_BLOCKS, Heads(4, 4, 3), [(36,)]),
    (CONCAT, GROUPED, [(4, 5), (4, 5)]),
    (SPLIT3, GROUPED, [(12, 4)]),
    (SPLIT3, GROUPED, [(12,)]),
    (STACKED, GROUPED, [(3, 4, 5)]),
    (STACKED_INPUTS_FIRST, GROUPED, [(3, 4, 5)]),
]


@pytest.mark.parametrize(("reshape", "heads", "shapes"), CASES)
def test_there_and_back(reshape: Reshape, heads: Heads, shapes: list[tuple[int, ...]]) -> None:
    theirs = [torch.randn(shape) for shape in shapes]
    ours = reshape.to_ours(theirs, heads)
    back = reshape.to_theirs(ours, heads)
    assert len(back) == len(theirs) and all(torch.equal(a, b) for a, b in zip(theirs, back, strict=True))
    assert sorted(torch.cat([t.flatten() for t in ours])) == sorted(torch.cat([t.flatten() for t in theirs]))
    meta = reshape.to_theirs([torch.empty(t.shape, device="meta") for t in ours], heads)
    assert [tuple(t.shape) for t in meta] == shapes  # how the shapes that a source must have are found


TABLE = Table(
    part="language",
    ours="decoder.layers.{}.",
    theirs="{model}h.{}.",
    layer=(*both("proj", "c_proj"), row("fc1.weight", "w2.weight w1.weight", CONCAT)),
    rest=(row("output.weight", "lm_head.weight"),),
    aside=(Aside(r"{model}h\.\d+\.attn\.bias", "mask"), Aside(r"tied\.weight", "tied", same_as=r"{model}wte.weight")),
    prefix="outer.",
    names={"model": "a.b."},
)


def test_rows_that_the_model_lacks_are_left_out() -> None:
    slots = dict.fromkeys(
        ["language.decoder.layers.0.proj.weight", "language.decoder.layers.1.proj.weight",
         "language.decoder.layers.1.fc1.weight"]
    )  # fmt: skip
    rules = {rule.ours: rule.theirs for rule in TABLE.rules(slots, 2)}
    assert rules == {
        ("language.decoder.layers.0.proj.weight",): ("a.b.h.0.c_proj.weight",),
        ("language.decoder.layers.1.proj.weight",): ("a.b.h.1.c_proj.weight",),
        ("language.decoder.layers.1.fc1.weight",): ("a.b.h.1.w2.weight", "a.b.h.1.w1.weight"),
    }


def test_experts_have_rows_of_their_own_where_a_layer_has_some() -> None:
    """Layer 0 has an MLP, layer 1 two experts: each with tensors of its own, or all in one."""
    expert, theirs = "mlp.experts.local_experts.{}", "a.b.h.1.mlp.experts"
    apart = row(f"{expert}.fc1.weight", "mlp.experts.{}.w2.weight mlp.experts.{}.w1.weight", CONCAT)
    stacked = row(f"{expert}.fc2.weight", "mlp.experts.down", STACKED_INPUTS_FIRST)
    table = dataclasses.replace(TABLE, layer=(row("mlp.fc1.weight", "mlp.w.weight"), apart, stacked))
    names = [f"language.decoder.layers.1.{expert.format(i)}." for i in range(2)]
    slots = dict.fromkeys(
        ["language.decoder.layers.0.mlp.fc1.weight", *(name + f"fc{n}.weight" for name in names for n in (1, 2))]
    )
    rules = table.rules(slots, 2)
    assert {rule.ours: rule.theirs for rule in rules} == {
        ("language.decoder.layers.0.mlp.fc1.weight",): ("a.b.h.0.mlp.w.weight",),
        (names[0] + "fc1.weight",): (f"{theirs}.0.w2.weight", f"{theirs}.0.w1.weight"),
        (names[1] + "fc1.weight",): (f"{theirs}.1.w2.weight", f"{theirs}.1.w1.weight"),
        (names[0] + "fc2.weight", names[1] + "fc2.weight"): (f"{theirs}.down",),
    }
    down = torch.arange(12.0).view(2, 2, 3)  # [experts, in, out]
    first, second = rules[-1].reshape.to_ours([down], GROUPED)
    assert first.tolist() == [[0, 3], [1, 4], [2, 5]] and torch.equal(second, down[1].T)


def test_asides_match_whole_names_and_dots_are_dots() -> None:
    asides = TABLE.asides(2)
    for name, why in (
        ("a.b.h.11.attn.bias", "mask"), ("a.b.h.x.attn.bias", None), ("a.b.h.1.attn.bias.weight", None),
        ("aXb.h.1.attn.bias", None), ("xa.b.h.1.attn.bias", None), ("outer.tied.weight", "tied"), ("tied.weight", None),
    ):  # fmt: skip
        found = find_aside(asides, name)
        assert (found.why if found else None) == why, name
    assert asides[1].same_as == r"a\.b\.wte.weight"


def test_same_bits() -> None:
    nan = torch.tensor([float("nan"), 0.0])
    assert same_bits(nan, nan.clone()) and not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(nan, nan.bfloat16()) and not same_bits(nan, nan[None])
    assert same_bits(torch.zeros(0, 3), torch.zeros(0, 3)) and same_bits(torch.tensor(1.0), torch.tensor(1.0))
    assert same_bits(torch.ones(2, 3).T, torch.ones(3, 2)) and same_bits(nan.double(), nan.double())
