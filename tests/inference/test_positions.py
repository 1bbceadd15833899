"""Positions past the trained length, against the formulas of Qwen v1 written out."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megavlm.config.schema import ParallelConfig
from megavlm.inference.positions import Positions, ntk_alpha
from megavlm.parallel.state import process_groups

WIDTH, BASE, TRAINED = 8, 10000, 16


@pytest.mark.parametrize(("length", "alpha"), [(0, 1), (1, 1), (2048, 1), (2049, 3), (4096, 3), (4097, 7), (8193, 15)])
def test_alpha_of_dynamic_ntk(length: int, alpha: float) -> None:
    assert ntk_alpha(length, 2048) == alpha


def positions(prompt_lengths: list[int], **lengths: int) -> Positions:
    with process_groups(ParallelConfig(), 1):
        rotary = RotaryEmbedding(WIDTH, 1.0, rotary_base=BASE, use_cpu_initialization=True)
        return Positions(SimpleNamespace(rotary_pos_emb=rotary), 64, prompt_lengths, **lengths)


def angles(base: float, span: range) -> torch.Tensor:
    inverse = torch.tensor([base ** (-2 * i / WIDTH) for i in range(WIDTH // 2)])
    half = torch.tensor(list(span), dtype=torch.float32)[:, None] * inverse
    return torch.cat([half, half], dim=1)


def test_the_base_widens_by_the_prompt() -> None:
    freqs, scale = positions([10, 40], ntk_length=TRAINED).of([(0, range(10)), (1, range(40)), (1, range(40, 41))])
    assert scale is None
    torch.testing.assert_close(freqs[:10, 0, 0], angles(BASE, range(10)))
    wide = BASE * 7 ** (WIDTH / (WIDTH - 2))  # 40 tokens of 16: ceil(log2(2.5) + 1) = 3
    torch.testing.assert_close(freqs[10:, 0, 0], angles(wide, range(41)), rtol=1e-5, atol=1e-5)


def test_queries_past_the_trained_length_are_scaled() -> None:
    _, scale = positions([40], logn_length=TRAINED).of([(0, range(14, 34))])
    assert scale is not None
    expected = [max(1.0, math.log(i) / math.log(TRAINED)) for i in range(15, 35)]
    torch.testing.assert_close(scale, torch.tensor(expected))
    assert scale[:2].tolist() == [1.0, 1.0] and scale[2] > 1
