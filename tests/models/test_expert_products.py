"""Products of experts on slices, and tokens' copies: what plain torch gives, token by token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megavlm.layers.expert_products import copies, products, summed

WIDTH, INNER, SIZES = 6, 4, [3, 0, 5, 1]
"""An expert nobody was sent to is among them."""


def made(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(x: Tensor, probs: Tensor, first: list[Tensor], second: list[Tensor]) -> Tensor:
    expert = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))
    rows = []
    for token, number, weight in zip(x, expert.tolist(), probs, strict=True):
        gate, up = (first[number] @ token).chunk(2)
        rows.append(second[number] @ (F.silu(gate) * up * weight))
    return torch.stack(rows)


def inputs(kind: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    x, probs = made(sum(SIZES), WIDTH, seed=1).to(kind).requires_grad_(), made(sum(SIZES), seed=2).requires_grad_()
    first = [made(2 * INNER, WIDTH, seed=10 + n).to(kind).requires_grad_() for n in range(len(SIZES))]
    second = [made(WIDTH, INNER, seed=20 + n).to(kind).requires_grad_() for n in range(len(SIZES))]
    return x, probs, first, second


@pytest.mark.parametrize("frozen", ["", "weights", "tokens"])
def test_equals_plain_torch(frozen: str) -> None:
    x, probs, first, second = inputs()
    for one in {"": [], "weights": [*first, *second], "tokens": [x, probs]}[frozen]:
        one.requires_grad_(False)
    leaves = [one for one in (x, probs, *first, *second) if one.requires_grad]
    out, expected = products(x, probs, SIZES, first, second), plain(x, probs, first, second)
    torch.testing.assert_close(out, expected)
    outer = made(*out.shape, seed=3)
    got = torch.autograd.grad((out * outer).sum(), leaves)
    wanted = torch.autograd.grad((expected * outer).sum(), leaves, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(got, wanted)


def test_bf16_with_weights_in_fp32() -> None:
    x, probs, first, second = inputs(torch.bfloat16)
    out = products(x, probs, SIZES, first, second)
    out.backward(made(*out.shape, seed=3).bfloat16())
    wide = [one.detach().float().requires_grad_() for one in (x, probs, *first, *second)]
    count = len(SIZES)
    expected = plain(wide[0], wide[1], wide[2 : 2 + count], wide[2 + count :])
    expected.backward(made(*out.shape, seed=3).bfloat16().float())
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.05)
    assert probs.grad is not None and probs.grad.dtype == torch.float32
    for got, one in zip((x, probs, *first, *second), wide, strict=True):
        assert got.grad is not None
        want = torch.zeros_like(one) if one.grad is None else one.grad
        torch.testing.assert_close(got.grad.float(), want, rtol=0.05, atol=0.15)


def test_gradients_are_added_to_a_buffer_that_is_there() -> None:
    x, probs, first, second = inputs()
    outer = made(sum(SIZES), WIDTH, seed=3)
    wanted = torch.autograd.grad((products(x, probs, SIZES, first, second) * outer).sum(), [*first, *second])
    for weight in (*first, *second):
        weight.main_grad = torch.ones_like(weight)  # type: ignore[attr-defined]
        weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    for times in (1, 2):
        (products(x, probs, SIZES, first, second) * outer).sum().backward()
        for weight, grad in zip((*first, *second), wanted, strict=True):
            torch.testing.assert_close(weight.main_grad, 1 + times * grad)  # type: ignore[attr-defined]
            assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
            assert weight.grad is not None, "its hook would not know that there is a gradient"


def test_copies_and_their_sums() -> None:
    """Tokens with no copy, with one and with several, in the order of experts."""
    tokens = made(5, 3, seed=1).requires_grad_()
    order = torch.tensor([0, 3, 4, 0, 1, 3, 0])
    made_of = copies(tokens, order)
    assert torch.equal(made_of, tokens[order])
    outer = made(7, 3, seed=2)
    (got,) = torch.autograd.grad((made_of * outer).sum(), tokens)
    torch.testing.assert_close(got, torch.zeros(5, 3).index_add(0, order, outer))
    parts = made(7, 3, seed=3).requires_grad_()
    whole = summed(parts, order, 5)
    torch.testing.assert_close(whole, torch.zeros(5, 3).index_add(0, order, parts))
    assert not whole[2].any()
    (back,) = torch.autograd.grad((whole * tokens.detach()).sum(), parts)
    assert torch.equal(back, tokens.detach()[order])
