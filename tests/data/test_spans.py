"""Which positions of a pack see each other both ways, by the mask kind of a model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import IMAGE_TOKEN, tiny_recipe

from megavlm.config.errors import UserError
from megavlm.data.batch import IGNORE_INDEX, make_pack
from megavlm.data.device_batch import make_batch
from megavlm.data.spans import TwoWaySpans, check_spans, spans_of
from megavlm.data.templates import find_template
from megavlm.inference.packs import pack_segments
from megavlm.layers.segments import two_way_spans

SLOT = 9
ONE, OTHER, THIRD = [SLOT, SLOT, 1, 2, 3], [1, SLOT, 2, SLOT, SLOT, SLOT], [4, 5]
LABELS = [[IGNORE_INDEX] * 3 + [2, 3], [IGNORE_INDEX, IGNORE_INDEX, 2, *[IGNORE_INDEX] * 3], [IGNORE_INDEX] * 2]


def spans(kind: str, **rest: object) -> list[list[int]]:
    """Return the spans of a pack of the three samples and padding."""
    pack = make_pack([ONE, OTHER, THIRD], 16, spans=TwoWaySpans(kind, SLOT), **rest)
    assert pack.two_way_spans is not None and pack.two_way_spans.shape[1:] == (2,)
    return pack.two_way_spans.tolist()


def test_a_prefix_ends_where_the_first_answer_begins() -> None:
    assert spans("prefix", labels=LABELS) == [[0, 3], [5, 7], [11, 13]]
    assert spans("prefix") == [[0, 5], [5, 11], [11, 13]], "a prompt is all prefix"
    assert spans("prefix", prefixes=[2, 6, 0]) == [[0, 2], [5, 11]], "but for what was answered already"


def test_pictures_are_runs_of_slots() -> None:
    assert spans("images", labels=LABELS) == [[0, 2], [6, 7], [8, 11]]
    none = make_pack([THIRD], 4, spans=TwoWaySpans("images", SLOT))
    assert none.two_way_spans is not None and none.two_way_spans.shape == (0, 2)
    # Runs of two samples that meet at the border are two.
    both = make_pack([[1, SLOT], [SLOT, 1]], 4, spans=TwoWaySpans("images", SLOT)).two_way_spans
    assert both is not None and both.tolist() == [[1, 2], [2, 3]]


def test_they_reach_the_layers() -> None:
    kind = TwoWaySpans("prefix", SLOT)
    batch = make_batch(make_pack([ONE, THIRD], 8, labels=[LABELS[0], LABELS[2]], spans=kind), None, torch.device("cpu"))
    assert two_way_spans(batch.packed_seq_params) == [(0, 3), (5, 7)]
    prompts = pack_segments([[*ONE, 7, 8]], 8, spans=kind, prompts=[len(ONE)])
    assert two_way_spans(prompts.packed_seq_params) == [(0, 5)]
    plain = make_batch(make_pack([ONE], 8), None, torch.device("cpu"))
    assert two_way_spans(plain.packed_seq_params) is None
    padding = make_batch(make_pack([], 8, spans=kind), None, torch.device("cpu"))
    assert two_way_spans(padding.packed_seq_params) == []


def test_a_model_says_its_kind() -> None:
    model = tiny_recipe().model
    assert spans_of(model, IMAGE_TOKEN) is None
    for kind in ("prefix", "images"):
        own = replace(model, language=replace(model.language, attention_mask=kind))
        assert spans_of(own, IMAGE_TOKEN) == TwoWaySpans(kind, IMAGE_TOKEN)


def test_what_is_seen_is_not_trained_on() -> None:
    prefix = TwoWaySpans("prefix", SLOT)
    check_spans(prefix, find_template("gemma"))
    check_spans(None, find_template("qwen_vl"))
    check_spans(TwoWaySpans("images", SLOT), find_template("qwen_vl"))
    with pytest.raises(UserError, match=r"model\.template: qwen_vl trains on tokens in front of an answer"):
        check_spans(prefix, find_template("qwen_vl"))
