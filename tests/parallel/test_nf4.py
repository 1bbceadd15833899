"""Quantised weights are bitsandbytes' own numbers, whole or in shards, and exist in full only while they multiply."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import ranks
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from megavlm.config.lora import check_quantiser
from megavlm.layers.nf4 import frozen_linear, quantise


def theirs(weight: torch.Tensor) -> torch.Tensor:
    codes, state = quantize_4bit(weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(codes, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_shards_are_pieces_of_what_the_library_makes_of_the_whole(dtype: torch.dtype, transposed: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 384, dtype=dtype)
    whole = theirs(weight.t()).t() if transposed else theirs(weight)
    assert 0.01 < (whole - weight).abs().max() < 0.8
    cut = weight.shape[1] if transposed else weight.shape[0]
    for pieces in ([(0, cut)], [(0, cut // 2)], [(cut // 2, cut)], [(0, 128), (cut - 128, cut)]):
        got = quantise(weight, pieces, transposed=transposed).dequantise()
        expected = torch.cat([whole[:, a:b] if transposed else whole[a:b] for a, b in pieces], dim=int(transposed))
        assert got.dtype is dtype and torch.equal(got, expected)


@pytest.mark.long
def test_ranks_have_the_shares_that_their_layers_would_have(tmp_path: Path) -> None:
    """Also of an MLP without a gate, whose rows are one piece."""
    for found in ranks.run("expert_checkpoint_cases:nf4_shares", str(tmp_path), world=2):
        assert len(found) == 2 * 4 + 2 * 2 + 2 + 2 + 4 * 2
        assert all(0.01 < apart < 0.15 for apart in found.values()), found


def test_memory_is_half_a_byte_and_a_little() -> None:
    packed = quantise(torch.randn(512, 1024), [(0, 512)], transposed=False)
    # 4 bits, 8 for each 64 weights, 32 for each 256 of these (QLoRA, section 3: 0.127 bits for the scales).
    assert packed.nbytes * 8 / (512 * 1024) == pytest.approx(4.127, abs=0.001)


def test_product_and_gradient() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(128, 256), torch.randn(128)
    packed = quantise(weight, [(0, 128)], transposed=False)
    x = torch.randn(5, 1, 256, requires_grad=True)
    y = frozen_linear(x, packed, bias)
    factor = torch.randn_like(y)
    (y * factor).sum().backward()
    again = x.detach().clone().requires_grad_()
    expected = F.linear(again, theirs(weight), bias)
    (expected * factor).sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, again.grad)


def test_no_full_weight_waits_for_the_backward_pass() -> None:
    packed = quantise(torch.randn(250, 256), [(0, 250)], transposed=False)
    x = torch.randn(3, 256, requires_grad=True)
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        y = frozen_linear(x, packed, None)
    gc.collect()
    alive = [
        o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.is_floating_point() and o.numel() >= 64000
    ]
    assert not saved and not [t for t in alive if tuple(t.shape) in ((250, 256), (256, 250))]
    y.sum().backward()
    assert x.grad is not None


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_quantiser(None)
    with pytest.raises(ValueError, match=r"lora.quantize: bitsandbytes is not installed"):
        check_quantiser("nf4")
