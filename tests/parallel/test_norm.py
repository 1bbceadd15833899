"""Norms compute in the right precision and carry the mark that sequence parallelism needs."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.layers.norm import TorchNorm


def norm(kind: str, dtype: torch.dtype = torch.float32, *, sequence_parallel: bool = False) -> TorchNorm:
    """Build a norm of width 64 with random weights."""
    config = TransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=2, normalization=kind, params_dtype=dtype,
        tensor_model_parallel_size=2, sequence_parallel=sequence_parallel,
    )  # fmt: skip
    made = TorchNorm(config=config, hidden_size=64, eps=1e-6)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_normalises_in_fp32_and_casts_before_the_weight(dtype: torch.dtype) -> None:
    made = norm("RMSNorm", dtype)
    x = (torch.randn(3, 5, 64) * 4).to(dtype)
    scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    expected = (x.float() * scale).to(dtype) * made.weight
    got = made(x)
    assert got.dtype is dtype
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert made.bias is None


def test_layer_norm() -> None:
    made = norm("LayerNorm")
    x = torch.randn(3, 5, 64) * 4 + 1
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * made.weight + made.bias
    torch.testing.assert_close(made(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_every_parameter_is_marked(kind: str, sequence_parallel: bool) -> None:
    made = norm(kind, sequence_parallel=sequence_parallel)
    marks = [parameter.sequence_parallel for parameter in made.parameters()]
    assert marks == [sequence_parallel] * (1 if kind == "RMSNorm" else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_the_same_without_gradients(dtype: torch.dtype) -> None:
    made = norm("RMSNorm", dtype)
    x = (torch.randn(3, 5, 64) * 4).to(dtype)
    with torch.no_grad():
        assert torch.equal(made(x), norm_with_gradients(made, x))


def norm_with_gradients(made: TorchNorm, x: torch.Tensor) -> torch.Tensor:
    """Return what training computes."""
    with torch.enable_grad():
        return made(x).detach()
