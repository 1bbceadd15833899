"""A parallel layer is stored whole in whatever container it lies."""

from __future__ import annotations

import pytest
import ranks
from test_proof import MODEL


@pytest.mark.dist
def test_every_container_is_asked() -> None:
    ((alone, wrong),) = ranks.run("container_cases:described", 1)
    assert not wrong
    shapes = {name: own[0][2] for name, own in alone.items()}
    assert shapes["plain.0.weight"] == (8, 6) and shapes["named.wrapped.own"] == (8, 3)
    halves = ranks.run("container_cases:described", 2, world=2)
    for rank, (found, wrong) in enumerate(halves):
        assert not wrong
        assert found.keys() == alone.keys()
        for name, own in found.items():
            assert own[0][2] == shapes[name], name  # as in one process
        begins = {name: own[0][1] for name, own in found.items()}
        assert begins["plain.0.weight"] == begins["listed.0.0.weight"] == (4 * rank, 0)
        assert begins["plain.2.weight"] == begins["named.wrapped.inner.0.weight"] == (0, 4 * rank)
        assert begins["plain.0.bias"] == (4 * rank,) and begins["plain.2.bias"] == (0,)
        assert begins["named.wrapped.own"] == (4 * rank, 0) and begins["named.wrapped.whole"] == (0,)
        gate, up = found["named.mlp.linear_fc1.weight"]  # each of the two is cut for itself
        assert (gate[1], up[1]) == ((4 * rank, 0), (8 + 4 * rank, 0))


@pytest.mark.dist
def test_weights_in_four_bits_keep_their_marks() -> None:
    lora = {"rank": 4, "targets": ["c_attn", "w1"], "quantize": "nf4"}
    recipe = {"model": MODEL, "parallel": {"tensor_model_parallel_size": 2}, "lora": lora}
    assert ranks.run("container_cases:quantised", {**recipe, "checkpoint": {"load": "unused"}}, world=2) == [[], []]
