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
from megavlm.layers.rotary import PackRotary
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
    t_TND = torch.randn(32, 3, 16)
    from megatron.core import parallel_state as mpu

    group = mpu.get_context_parallel_group()
    expected = rotary._plain_thd(t_TND, packed.cu_seqlens_q, table, cp_group=group)
    assert torch.equal(
        rope_utils._apply_rotary_pos_emb_thd(t_TND, packed.cu_seqlens_q, freqs, cp_group=group), expected
    )


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
