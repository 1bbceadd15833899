"""Mamba's scan and convolution over packs of several blocks, what does not go with it, and how a new one begins.

The reference is Transformers' ``mamba_selective_scan`` and ``causal_conv1d_fn`` (``models/mamba/modeling_mamba.py``), a
segment at a time. Whole models at several layouts: tests/families/test_text_kinds.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_recipe
from torch import Tensor
from transformers.models.mamba.modeling_mamba import causal_conv1d_fn, mamba_selective_scan

from megavlm.config.architecture import LANGUAGE
from megavlm.config.checks import check_recipe
from megavlm.config.errors import RecipeError
from megavlm.families.presets import load_presets
from megavlm.layers.selective_scan import BLOCK, Scan, causal_convolution
from megavlm.models.build import build_model, unwrap

LENGTHS = (BLOCK + 33, 1, 2 * BLOCK + 5, 14)
CHANNELS, STATE, TAPS = 6, 4, 3
LANGUAGE_OF = {"preset": "tiny_mamba", "hidden_size": 64, "intermediate_size": 128, "time_step_rank": 5}


def drawn(*shape: int, seed: int, learns: bool = True) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(learns)


def places() -> Tensor:
    return torch.cat([torch.arange(length) for length in LENGTHS])


def compare(found: Tensor, wanted: Tensor, learned: list[Tensor]) -> None:
    """Values, and gradients of the same weighted sum."""
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    here, there = (torch.autograd.grad((one * weights).sum(), learned) for one in (found, wanted))
    for mine, theirs in zip(here, there, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_the_scan_of_a_pack_is_that_of_its_segments_from_zeros() -> None:
    total = sum(LENGTHS)
    a_log = torch.log(torch.arange(1.0, STATE + 1)).expand(CHANNELS, -1).clone().requires_grad_()
    skip, bias = drawn(CHANNELS, seed=1), drawn(CHANNELS, seed=2)
    x, step, gate = (drawn(total, CHANNELS, seed=seed) for seed in (3, 4, 5))
    into, out = (drawn(total, STATE, seed=seed) for seed in (6, 7))
    found, last = Scan(a_log, skip, bias).of(x, step, into, out, gate, places() == 0)
    parts, end = [], torch.empty(0)
    for own in zip(*(one.split(LENGTHS) for one in (x, step, into, out, gate)), strict=True):
        x_1CL, step_1CL, in_1NL, out_1NL, gate_1CL = (one.T[None] for one in own)
        y, end = mamba_selective_scan(
            x_1CL, step_1CL, -torch.exp(a_log), in_1NL, out_1NL, D=skip, z=gate_1CL, delta_bias=bias,
            delta_softplus=True, return_last_state=True,
        )  # fmt: skip
        parts.append(y[0].T)
    torch.testing.assert_close(last, end[0], rtol=1e-4, atol=1e-5)
    compare(found, torch.cat(parts), [a_log, skip, bias, x, step, into, out, gate])


def test_the_scan_goes_on_from_a_state() -> None:
    """In two parts as in one."""
    total = BLOCK + 40
    scan = Scan(drawn(CHANNELS, STATE, seed=1), drawn(CHANNELS, seed=2), drawn(CHANNELS, seed=3))
    given = [drawn(total, size, seed=4 + i) for i, size in enumerate((CHANNELS, CHANNELS, STATE, STATE, CHANNELS))]
    fresh = torch.zeros(total, dtype=torch.bool)
    whole, last = scan.of(*given, fresh)
    first, between = scan.of(*(one[:70] for one in given), fresh[:70])
    second, end = scan.of(*(one[70:] for one in given), fresh[70:], between)
    torch.testing.assert_close(torch.cat([first, second]), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(end, last, rtol=1e-4, atol=1e-5)


def test_the_convolution_of_a_pack_sees_no_other_segment() -> None:
    x = drawn(sum(LENGTHS), CHANNELS, seed=1)
    weight, bias = drawn(CHANNELS, TAPS, seed=2), drawn(CHANNELS, seed=3)
    found = causal_convolution(x, weight, bias, places())
    parts = [causal_conv1d_fn(own.T[None], weight, bias, activation="silu")[0].T for own in x.split(LENGTHS)]
    compare(found, torch.cat(parts), [x, weight, bias])


CP2 = {"context_parallel_size": 2}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"parallel": CP2}, "context_parallel_size: cuts each sample"),
        ({"parallel": {**CP2, "cp_comm_type": "a2a"}}, "context_parallel_size: cuts each sample"),
        ({"parallel": {"recompute_granularity": "selective"}}, "recompute_granularity: selective is for the core"),
        ({"parallel": {"tensor_model_parallel_size": 3}}, "intermediate_size: 128 is not divisible"),
        ({"engine": {"fp8": "hybrid"}}, "FP8 is not known to fit the mamba architecture"),
        ({"engine": {"cuda_graph_impl": "transformer_engine"}}, "Mamba's layers have neither"),
        ({"engine": {"tp_comm_overlap": True}}, "Mamba's are Megatron-Core's"),
        ({"engine": {"apply_rope_fusion": "on"}}, "Mamba has no heads"),
        ({"engine": {"bias_activation_fusion": "on"}}, "engine.bias_activation_fusion: is of MLPs"),
        ({"lora": {"rank": 8, "targets": ["in_proj"], "quantize": "nf4"}}, "Mamba's weights are not kept in 4 bits"),
        ({"lora": {"rank": 8, "targets": ["out_proj"]}}, "'out_proj' is none of the language model's layers"),
    ],
)
def test_what_does_not_go_with_it_is_refused_by_name(keys: dict[str, Any], words: str) -> None:
    recipe = tiny_recipe(model={"preset": "tiny", "language": LANGUAGE_OF}, **keys)
    with pytest.raises(RecipeError) as caught:
        check_recipe(recipe)
    assert words in str(caught.value)


def test_a_new_one_begins_as_the_published_code_does() -> None:
    """Decays 1 .. N, skips 1, step sizes between 0.001 and 0.1 where nothing goes in."""
    load_presets()
    recipe = tiny_recipe(model={"preset": "tiny", "language": LANGUAGE_OF})
    layer = unwrap(build_model(recipe, 511)[0]).language.decoder.layers[1]
    mixer = layer.self_attention
    torch.testing.assert_close(mixer.ssm.A_log.exp(), torch.arange(1.0, 17.0).expand(128, -1))
    assert torch.equal(mixer.ssm.D, torch.ones(128))
    steps = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert 0.00099 <= float(steps.min()) < 0.004 < 0.03 < float(steps.max()) <= 0.1001
    assert float(mixer.conv1d.weight.abs().max()) <= 0.5 and float(mixer.conv1d.weight.std()) > 0.2
    assert float(mixer.dt_proj.weight.abs().max()) <= 5**-0.5 < 1.2 * float(mixer.dt_proj.weight.abs().max())
    assert LANGUAGE.find("mamba_2_8b").values["time_step_rank"] == 160
