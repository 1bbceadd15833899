"""Norms compute in the right precision and carry the mark that sequence parallelism needs."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.layers.norm import TorchNorm
from megavlm.layers.scale import NormedSum


def norm(
    kind: str, dtype: torch.dtype = torch.float32, *, sequence_parallel: bool = False, around_1: bool = False
) -> TorchNorm:
    """Build a norm of width 64 with random weights."""
    config = config_of(kind, dtype, sequence_parallel=sequence_parallel, around_1=around_1)
    made = TorchNorm(config=config, hidden_size=64, eps=1e-6)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def config_of(
    kind: str, dtype: torch.dtype = torch.float32, *, sequence_parallel: bool = False, around_1: bool = False
) -> TransformerConfig:
    """Return the settings of a layer of width 64."""
    return TransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=2, normalization=kind, params_dtype=dtype,
        tensor_model_parallel_size=2, sequence_parallel=sequence_parallel,
        layernorm_zero_centered_gamma=around_1, layernorm_epsilon=1e-6,
    )  # fmt: skip


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


@pytest.mark.parametrize("around_1", [False, True])
@pytest.mark.parametrize("frozen", ["", "weight", "x"])
def test_gradients_of_rms_norm_in_fp32_are_torchs_bit_for_bit(frozen: str, around_1: bool) -> None:
    made = norm("RMSNorm", around_1=around_1)
    x, outer = torch.randn(2, 33, 3, 64, generator=torch.Generator().manual_seed(1))
    leaves = [one.requires_grad_(frozen != name) for name, one in {"x": x, "weight": made.weight}.items()]
    # Beside the norm: where there are three gradients to be summed, their order matters.
    plain = torch.nn.functional.rms_norm(x, (64,), None, 1e-6) * made.weight + x
    if around_1:
        plain = torch.nn.functional.rms_norm(x, (64,), 1 + made.weight, 1e-6) + x
    got = made(x) + x
    assert torch.equal(got, plain)
    asked = [one for one in leaves if one.requires_grad]
    pairs = zip(torch.autograd.grad(got, asked, outer), torch.autograd.grad(plain, asked, outer), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


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


@pytest.mark.parametrize("around_1", [False, True])
def test_a_normed_branch_of_an_answer_needs_no_graph(around_1: bool) -> None:
    """What a pipeline stage receives requires gradients, in inference mode too, and layers switch gradients on."""
    made = norm("RMSNorm", around_1=around_1)
    branch = NormedSum(TorchNorm, config_of("RMSNorm", around_1=around_1)).eval()
    branch.norm.load_state_dict(made.state_dict())
    x = torch.randn(3, 5, 64)
    with torch.inference_mode():
        received = torch.ones(3, 5, 64, requires_grad=True)
        with torch.enable_grad():
            got = branch(False, False)((x.clone(), None), received, 0.0)
        assert torch.equal(got, received + made(x))
    assert not got.requires_grad
