"""What a panel asks: the first exchange of each held-out sample, with its own images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from run_data import RunData

from megavlm.config.schema import DataSource
from megavlm.data.batch import make_pack
from megavlm.data.decoders import make_decoder
from megavlm.data.media import plan_of
from megavlm.data.read_pack import decode_pack
from megavlm.data.reader import PackReader
from megavlm.data.tokenizer import load_tokenizer
from megavlm.training.panel import find_questions


def test_questions_of_held_out_packs(run_data: RunData, tmp_path: Path) -> None:
    recipe = run_data.recipe(tmp_path)
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    plan = plan_of(recipe.model)
    source = DataSource(path=str(run_data.root / "heldout"))
    reader = PackReader([source], recipe.data, tokenizer, plan, rank=0, world_size=1, seed=0, training=False)
    decoder = make_decoder("simplejpeg")
    packs = [decode_pack(pack, decoder, plan, tokenizer.imgpad_id) for pack in reader]
    questions = find_questions(packs, tokenizer, plan, room=150, count=1000)
    assert len(questions) == sum(int((item.pack.segment_sources >= 0).sum()) for item in packs)
    shown = torch.cat([question.pixels for question in questions if question.pixels is not None])
    assert torch.equal(shown, torch.cat([item.pixels for item in packs]))  # each picture once, in order
    for question in questions:
        assert int((question.prompt == tokenizer.imgpad_id).sum()) == plan.tokens_per_view * len(question.shapes)
        text = tokenizer.decode(question.prompt.tolist())
        assert text.endswith("<|im_start|>assistant\n")
        assert 0 < len(question.expected) < 60
        assert tokenizer.ids["<|im_end|>"] not in question.expected
    assert {len(question.shapes) for question in questions} >= {0, 1, 2}
    assert len(find_questions(packs, tokenizer, plan, room=150, count=2)) == 2
    assert find_questions(packs, tokenizer, plan, room=5, count=9) == []


def test_an_empty_pack_has_nothing_to_ask() -> None:
    pack = make_pack([], 32, pad_token=7)
    assert pack.padding_tokens == 32
    assert pack.supervised_tokens == 0
    assert np.array_equal(pack.cu_seqlens, [0, 32])
    with pytest.raises(IndexError):
        _ = pack.sample_keys[0]
