"""Pictures of any size in steps: on one replica alone without hang or drift; 16 of them among 32,768 tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks

from megavlm.parallel.device import prepare_device

prepare_device()

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
# By step and pack: text on the second replica, then on the first, then on both, then pictures on both.
PACKS: list[list[list[tuple[int, int]]]] = [
    [[(40, 24)], []],
    [[], [(16, 16), (60, 20)]],
    [[], []],
    [[(8, 8)], [(32, 64)]],
]
FROZEN = {"vision": {"freeze": True}}


@pytest.mark.parametrize("modules", [{}, FROZEN], ids=["all", "frozen tower"])
def test_pictures_on_one_replica_and_text_on_the_other(modules: dict[str, Any]) -> None:
    """With the distributed optimizer and overlap: the losses and gradient norms of one process with both packs."""
    branches: dict[str, Any] = {"training": {"global_batch_size": 2, "train_steps": 4}, "modules": modules}
    (alone,) = ranks.run("packed_steps:replicas_losses", PACKS, branches, world=1)
    both = ranks.run("packed_steps:replicas_losses", PACKS, {**branches, "parallel": OVERLAP}, world=2)
    for found in both:
        for one, other in zip(found, alone, strict=True):
            assert one == pytest.approx(other, rel=1e-5)
    assert all(norm > 0 for _, norm in alone)


def test_grids_and_slots_that_do_not_match_are_no_step() -> None:
    """Whoever made such a batch has an error: nothing is cut, shifted or left out."""
    ((slots, grids, odd),) = ranks.run("packed_steps:mismatches", world=1)
    assert "image slots, as there are image features" in slots
    assert "patches, but pictures of" in grids and "is not made of blocks of 2 x 2" in odd


@pytest.mark.long
@pytest.mark.family("qwen2_vl", "qwen2_5_vl")
def test_one_sample_of_32768_tokens_and_16_pictures(tmp_path: Path) -> None:
    """At TP 2 x PP 2 with sequence parallelism it is what it is in one process, and the planner knows its memory."""
    sizes = [(128, 128), (256, 64), (96, 160), (200, 88)] * 4
    branches: dict[str, Any] = {
        "training": {"global_batch_size": 1},
        "language": {
            "num_layers": 2,
            "num_attention_heads": 2,
            "num_query_groups": 2,
            "max_position_embeddings": 32768,
        },
    }
    wide = {**branches, "parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}}
    wide["parallel"]["sequence_parallel"] = True
    (alone,) = ranks.run("packed_steps:long_sample", str(tmp_path), 32768, sizes, branches, world=1, timeout=900)
    found = ranks.run("packed_steps:long_sample", str(tmp_path), 32768, sizes, wide, world=4, timeout=900)
    assert max(alone.worst.values()) == 0 and alone.loss > 1
    for one in found:
        assert one.loss in (0, pytest.approx(alone.loss, rel=1e-5))
        assert max(one.worst.values()) < 5e-5, max(one.worst, key=lambda name: one.worst[name])
    names = {name for one in found for name in one.worst}
    assert names == set(alone.worst) and any(name.startswith("vision.") for name in names)
    for one in (alone, *found):
        # A last stage of one layer: what comes and goes in it, and in the output layer, is most, and not at one time.
        most = 1.06 if one is alone or any(name.startswith("vision.") for name in one.worst) else 1.12
        assert 0.97 * one.peak < one.planned < most * one.peak
