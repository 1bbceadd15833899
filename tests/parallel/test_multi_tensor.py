"""Norms and scales of many tensors: the same as one by one."""

from __future__ import annotations

import torch
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale

from megavlm.config.schema import ParallelConfig
from megavlm.parallel import multi_tensor
from megavlm.parallel.state import process_groups


def _tensors():
    torch.manual_seed(0)
    return [torch.randn(shape) for shape in ((3, 5), (7,), (), (1, 2, 3))]


def test_the_norm_is_that_of_all_tensors():
    flag = torch.zeros(1, dtype=torch.int)
    norm, rest = multi_tensor.l2_norm(1, flag, [_tensors()], False)
    expected, _ = local_multi_tensor_l2_norm(1, flag, [_tensors()], False)
    assert rest is None and norm.shape == expected.shape == (1,) and norm.dtype is torch.float32
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)


def test_scaling_in_place_and_into_others():
    flag = torch.zeros(1, dtype=torch.int)
    ours, theirs = _tensors(), _tensors()
    multi_tensor.scale(1, flag, [ours, ours], 0.3)
    local_multi_tensor_scale(1, flag, [theirs, theirs], 0.3)
    others = [torch.full_like(one, float("nan")) for one in ours]
    multi_tensor.scale(1, flag, [_tensors(), others], 0.3)
    for one, other, third in zip(ours, theirs, others, strict=True):
        assert torch.equal(one, other) and torch.equal(third, other)


def test_megatron_uses_them():
    with process_groups(ParallelConfig(), 1):
        assert clip_grads.l2_norm_impl is multi_tensor.l2_norm
        assert clip_grads.multi_tensor_scale_impl is multi_tensor.scale
