"""Angles of a pack: Megatron-Core's own, bit for bit, for any segments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from tiny import tiny_recipe

from megavlm.config.schema import ParallelConfig
from megavlm.layers import rotary
from megavlm.layers.rotary import PackRotary, pair_axes
from megavlm.layers.segments import packed_segments, segment_lengths
from megavlm.parallel.state import process_groups

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def groups():
    with process_groups(ParallelConfig(), 1):
        yield


@pytest.mark.parametrize("lengths", [(7, 1, 24), (32,), (1, 1, 30), (16, 16)])
@pytest.mark.parametrize("more", [{}, {"seq_len_interpolation_factor": 4.0}, {"rope_scaling": True}])
def test_angles_and_rotation_are_megatrons(lengths, more):
    plain = RotaryEmbedding(16, 1.0, rotary_base=10000, **more)
    ours = RotaryEmbedding(16, 1.0, rotary_base=10000, **more)
    PackRotary.take_over(ours)
    positions = torch.cat([torch.arange(length) for length in lengths])
    packed = packed_segments(np.cumsum([0, *lengths]).astype(np.int32), CPU, positions)
    freqs = ours(ours.get_rotary_seq_len(None, None, None, None, packed))
    table = plain(plain.get_rotary_seq_len(None, None, None, None, packed))
    assert torch.equal(freqs, table[positions])
    t_TND, outer_TND = torch.randn(2, 32, 3, 16)
    t_TND.requires_grad_()
    from megatron.core import parallel_state as mpu

    group = mpu.get_context_parallel_group()
    expected = rotary._plain_thd(t_TND, packed.cu_seqlens_q, table, cp_group=group)
    turned = rope_utils._apply_rotary_pos_emb_thd(t_TND, packed.cu_seqlens_q, freqs, cp_group=group)
    assert torch.equal(turned, expected)
    (got,), (wanted,) = (torch.autograd.grad(one, t_TND, outer_TND) for one in (turned, expected))
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("interleaved", [False, True])
def test_part_of_a_head_in_neighbouring_pairs_is_glms(interleaved):
    """GLM-4.1V: half of a head, pairs of neighbours, sections; against Transformers' functions."""
    from megatron.core import parallel_state as mpu
    from transformers import Glm4vTextConfig
    from transformers.models.glm4v.modeling_glm4v import Glm4vTextRotaryEmbedding, apply_rotary_pos_emb

    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 2, 1]}
    config = Glm4vTextConfig(hidden_size=48, num_attention_heads=3, num_key_value_heads=3, rope_parameters=rope)
    positions = torch.randint(0, 99, (3, 32), generator=torch.Generator().manual_seed(1))
    query, key = torch.randn(2, 1, 3, 32, 16, generator=torch.Generator().manual_seed(2))
    cos, sin = Glm4vTextRotaryEmbedding(config)(query, positions[:, None])
    expected = apply_rotary_pos_emb(query, key, cos, sin)
    ours = RotaryEmbedding(16, 0.5, rotary_interleaved=True, rotary_base=10000)
    PackRotary.take_over(ours, pair_axes([1, 2, 1], interleaved=False))
    packed = packed_segments(np.array([0, 20, 32], np.int32), CPU, positions)
    freqs = ours(ours.get_rotary_seq_len(None, None, None, None, packed))
    assert freqs.shape == (32, 1, 1, 8)
    for t_BNTD, turned in zip((query, key), expected, strict=True):
        got = rope_utils._apply_rotary_pos_emb_thd(
            t_BNTD[0].transpose(0, 1), packed.cu_seqlens_q, freqs,
            rotary_interleaved=interleaved, cp_group=mpu.get_context_parallel_group(),
        )  # fmt: skip
        same = torch.allclose(got.transpose(0, 1), turned[0], atol=1e-6)
        assert same is interleaved  # the angles of pairs that are half a head apart are others


def test_sections_take_turns():
    assert pair_axes([], interleaved=True) is None
    assert pair_axes([2, 1, 3], interleaved=False) == [0, 0, 1, 2, 2, 2]
    assert pair_axes([24, 20, 20], interleaved=True) == [0, 1, 2] * 20 + [0] * 4  # Qwen3-VL
    assert pair_axes([6, 1, 1], interleaved=True) == [0, 1, 2] + [0] * 5


def test_positions_have_as_many_numbers_as_the_model_knows():
    plain, own = RotaryEmbedding(8, 1.0), RotaryEmbedding(8, 1.0)
    PackRotary.take_over(plain)
    PackRotary.take_over(own, [0, 1, 1, 2])
    for rotary_of, positions in ((plain, torch.zeros(3, 5)), (own, torch.zeros(5))):
        with pytest.raises(AssertionError, match="positions"):
            rotary_of(positions)


def test_without_positions_it_is_megatrons():
    ours = RotaryEmbedding(16, 1.0)
    expected = ours(12)
    PackRotary.take_over(ours)
    packed = packed_segments(np.array([0, 12, 20], np.int32), CPU)
    assert ours.get_rotary_seq_len(None, None, None, None, packed) == 12
    assert torch.equal(ours(12), expected)


def test_lengths_are_known_or_read():
    packed = packed_segments(np.array([0, 3, 10], np.int32), CPU)
    assert segment_lengths(packed) == [3, 7]
    del packed.segment_lengths
    assert segment_lengths(packed) == [3, 7]
    assert packed.max_seqlen_q == 7


def test_every_language_model_takes_the_positions_of_the_pack():
    from megavlm.models.build import build_model, unwrap

    recipe = tiny_recipe()
    (chunk,) = build_model(recipe, recipe.model.language.vocab_size - 1)
    assert type(unwrap(chunk).language.rotary_pos_emb) is PackRotary
