"""loss.z_loss against plain torch: losses and gradients, over a vocabulary that ranks share."""

from __future__ import annotations

import pytest
import ranks
import torch
import torch.nn.functional as F

S, V = 12, 64


@pytest.mark.dist
@pytest.mark.parametrize("tp", [1, 2])
def test_it_is_the_square_of_the_logarithm_of_z(tp: int) -> None:
    """With logits that are taken out of the softmax, large ones, and positions that no loss counts."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(S, V, generator=generator) * 3
    logits[1] += 500  # exp would overflow
    logits[2] -= 500
    logits[:, 40:44] = torch.finfo(torch.float32).min
    labels = torch.randint(0, 40, (S,), generator=generator)
    upstream = torch.randn(S, generator=generator)
    upstream[7] = 0
    labels[7] = 41  # of a position that does not count
    weight = 0.03
    own = logits.clone().requires_grad_()
    cross = F.cross_entropy(own, labels, reduction="none")
    wanted = cross + weight * torch.logsumexp(own, -1).square()
    counted = upstream != 0
    (wanted[counted] * upstream[counted]).sum().backward()
    found = ranks.run("z_loss_cases:losses", logits, labels, upstream, weight, tp, world=tp)
    for losses, plain, _ in found:
        torch.testing.assert_close(losses[counted], wanted.detach()[counted], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(plain[counted], cross.detach()[counted], rtol=1e-5, atol=1e-4)
        assert torch.isfinite(losses).all() and (losses - plain)[counted].abs().max() > 1
    gradient = torch.cat([one for *_, one in found], 1)
    torch.testing.assert_close(gradient, own.grad, rtol=1e-4, atol=1e-5)
