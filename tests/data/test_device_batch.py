"""What a batch is made of, and that packs made by hand follow the same rules as those of the reader."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from tiny import random_packs

from megavlm.data.batch import IGNORE_INDEX, make_pack
from megavlm.data.device_batch import FIELDS, Batch, make_batch

CPU = torch.device("cpu")


def test_a_pack_of_segments() -> None:
    pack = make_pack([[5, 6, 7], [8, 9]], 7, labels=[[0, 6, 7], [IGNORE_INDEX, 9]], sources=[1, 0], pad_token=3)
    assert pack.tokens.tolist() == [5, 6, 7, 8, 9, 3, 3]
    assert pack.labels.tolist() == [6, 7, IGNORE_INDEX, 9, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]
    assert pack.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert pack.cu_seqlens.tolist() == [0, 3, 5, 7] and pack.segment_sources.tolist() == [1, 0, -1]
    assert make_pack([[1, 2]], 2).supervised_tokens == 0
    with pytest.raises(ValueError, match="do not make a pack of 2"):
        make_pack([[1, 2], [3]], 2)
    with pytest.raises(ValueError, match="labels"):  # not spread over the segment
        make_pack([[1, 2, 3, 4]], 4, labels=[[1, 2]])


def test_weights_move_with_their_labels() -> None:
    weighted = make_pack([[5, 6, 7], [8, 9]], 6, labels=[[0, 6, 7], [0, 9]], weights=[[1, 0.5, 2], None])
    assert weighted.loss_weights is not None and weighted.loss_weights.tolist() == [0.5, 2, 1, 1, 1, 1]
    assert make_pack([[5, 6, 7]], 3, labels=[[0, 6, 7]], weights=[None]).loss_weights is None
    batch = make_batch(weighted, None, CPU)
    assert batch.loss_weights is not None and batch.loss_weights.shape == batch.tokens.shape


def test_every_field_has_its_place() -> None:
    placed = {one.name for one in FIELDS}
    kept = {one.name for one in fields(Batch)}
    # The one is made of the other; who encodes what, and what came of it, is set where the tower is on all ranks.
    assert placed - kept == {"cu_seqlens", "two_way_spans"}
    assert kept - placed == {"packed_seq_params", "shared", "view_features"}


def test_fields_with_a_value_per_position_are_equally_long() -> None:
    pack, pixels = random_packs(1)[0]
    batch = make_batch(pack, torch.from_numpy(pixels), CPU)
    assert batch.num_images == len(pixels) and batch.labels is not None
    assert batch.inputs()["labels"] is None
    assert batch.inputs(with_labels=True)["labels"].min() >= 0 > batch.labels.min()
    with pytest.raises(AssertionError, match="different lengths"):
        make_batch(replace(pack, labels=np.append(pack.labels, 1)), None, CPU)
