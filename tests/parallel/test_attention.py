"""Core attention equals softmax attention written out, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megavlm.config.schema import ParallelConfig
from megavlm.layers.attention import TorchAttention
from megavlm.parallel.state import process_groups

HEADS, WIDTH = 4, 8


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    with process_groups(ParallelConfig(), seed=1):
        yield


def attention(mask: AttnMaskType, groups: int = HEADS, scale: float | None = None) -> TorchAttention:
    """Build the core attention."""
    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, num_query_groups=groups,
        attention_dropout=0.0, use_cpu_initialization=True,
    )  # fmt: skip
    return TorchAttention(config, 1, mask, "self", softmax_scale=scale)


def naive(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float | None = None) -> Tensor:
    """Attend with [S, B, heads, D] tensors where ``allowed`` [S, K] is true."""
    k, v = (t.repeat_interleave(q.size(2) // t.size(2), dim=2) for t in (k, v))
    scores = torch.einsum("sbnd,kbnd->bnsk", q, k) * (scale or 1 / math.sqrt(q.size(-1)))
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return torch.einsum("bnsk,kbnd->sbnd", weights, v)


def random(*shape: int) -> Tensor:
    """Return a random leaf that wants a gradient."""
    return torch.randn(*shape).requires_grad_()


def compare(got: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    """Compare outputs and the gradients of every input."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(expected.shape)
    got_gradients = torch.autograd.grad((got * weights).sum(), leaves, retain_graph=True)
    for one, other in zip(got_gradients, torch.autograd.grad((expected * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("causal", [True, False])
def test_unpacked(causal: bool, scale: float | None, groups: int) -> None:
    q, k, v = random(7, 3, HEADS, WIDTH), random(7, 3, groups, WIDTH), random(7, 3, groups, WIDTH)
    allowed = torch.ones(7, 7, dtype=torch.bool)
    mask = AttnMaskType.causal if causal else AttnMaskType.no_mask
    got = attention(mask, groups, scale)(q, k, v)
    assert got.shape == (7, 3, HEADS * WIDTH)
    compare(got.unflatten(-1, (HEADS, WIDTH)), naive(q, k, v, allowed.tril() if causal else allowed, scale), [q, k, v])


def test_cross_attention_has_its_own_number_of_keys() -> None:
    q, k, v = random(4, 2, HEADS, WIDTH), random(9, 2, HEADS, WIDTH), random(9, 2, HEADS, WIDTH)
    got = attention(AttnMaskType.causal)(q, k, v, attn_mask_type=AttnMaskType.no_mask)
    expected = naive(q, k, v, torch.ones(4, 9, dtype=torch.bool))
    compare(got.unflatten(-1, (HEADS, WIDTH)), expected, [q, k, v])


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_packed(causal: bool, groups: int) -> None:
    lengths, rest = [5, 1, 6], 3
    total = sum(lengths)
    q = random(total + rest, HEADS, WIDTH)
    k, v = random(total + rest, groups, WIDTH), random(total + rest, groups, WIDTH)
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders)
    mask = AttnMaskType.causal if causal else AttnMaskType.no_mask
    got = attention(mask, groups)(q, k, v, packed_seq_params=packed)
    assert got.shape == (total + rest, HEADS, WIDTH)
    assert torch.equal(got[total:], torch.zeros(rest, HEADS, WIDTH)), "what follows the last segment is zero"
    allowed = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool()
    expected = naive(*(t[:total, None] for t in (q, k, v)), allowed.tril() if causal else allowed)[:, 0]
    compare(got[:total], expected, [q, k, v])


def test_what_it_cannot_do_it_refuses() -> None:
    q = torch.randn(3, 1, HEADS, WIDTH)
    with pytest.raises(ValueError, match="no explicit mask"):
        attention(AttnMaskType.causal)(q, q, q, torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"not AttnMaskType\.arbitrary"):
        attention(AttnMaskType.arbitrary)(q, q, q)
