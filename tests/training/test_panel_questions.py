"""What a panel asks: the first exchange of each held-out sample, with its own images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from run_data import RunData
from tokenizer_files import write_llava, write_qwen2

from megavlm.config.schema import DataSource
from megavlm.data.batch import make_pack
from megavlm.data.box_space import BoxSpace, on_first_view
from megavlm.data.chat import encode_prompt
from megavlm.data.decoders import make_decoder
from megavlm.data.media import Box, Canvas, ImageLayout, ImagePlan, ImageShape, View, plan_of
from megavlm.data.plans_single import PadPlan, SquashPlan
from megavlm.data.read_pack import decode_pack
from megavlm.data.reader import PackReader
from megavlm.data.schema import Turn
from megavlm.data.templates import find_template
from megavlm.data.tokenizer import load_tokenizer
from megavlm.evaluation import panel
from megavlm.evaluation.panel import draw_pictures
from megavlm.training.panel import HeldOutQuestion, find_questions, panel_item


@dataclass(frozen=True)
class Halves(ImagePlan):
    """The left and the right half of a picture."""

    def lay_out(self, shape: ImageShape) -> ImageLayout:
        whole, side = Box(0, 0, shape.width, shape.height), self.side
        canvas = Canvas(whole, (2 * side, side), Box(0, 0, 2 * side, side))
        views = (View(0, Box(0, 0, side, side)), View(0, Box(side, 0, 2 * side, side)))
        return ImageLayout(shape, (canvas,), views, (2 * self.tokens_per_view,), (1, 2))


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


@pytest.mark.parametrize("template", ["qwen_vl", "minigpt_v2", "cogvlm_base"])
@pytest.mark.parametrize("kind", ["squash", "pad", "tiles"])
def test_boxes_lie_where_the_model_sees_them(template: str, kind: str, tmp_path: Path) -> None:
    """A card shows the first view: all of the picture, its middle strip of a square, or its left half."""
    plan: ImagePlan = {"squash": SquashPlan(64, 4), "pad": PadPlan(64, 4), "tiles": Halves(64, 4)}[kind]
    expected, predicted, wrong = {
        "qwen_vl": ("<box>(125,250),(375,750)</box>", "<ref>it</ref><box>(125,250),(375,500)</box>",
                    "<box>(1,1),(9,9)</box>"),
        "minigpt_v2": ("{<12><25><38><75>}", "{<12><25><38><50>}", "{<1><1><9><9>}"),
        "cogvlm_base": ("[[125,250,375,750]]", "it is at [[125,250,375,500]]", "[[001,001,009,009]]"),
    }[template]  # fmt: skip
    tokenizer = load_tokenizer(write_qwen2(tmp_path) if template == "qwen_vl" else write_llava(tmp_path),
                               find_template(template))  # fmt: skip
    shape = ImageShape(128, 64)
    runs = [(4 * len(plan.of(shape).views),)]
    prompt = encode_prompt([Turn("user", "<img></img>Where?")], tokenizer, runs, None)
    pixels = torch.full((len(plan.of(shape).views), 3, 64, 64), 200, dtype=torch.uint8)
    question = HeldOutQuestion(prompt, np.asarray(tokenizer.encode(expected)), pixels, [shape])
    item = panel_item(question, tokenizer.encode(predicted), tokenizer, BoxSpace(plan))
    assert (item.expected, item.predicted, item.question.strip()[-6:]) == (expected, predicted, "Where?")
    assert item.is_correct and not panel_item(question, tokenizer.encode(wrong), tokenizer, BoxSpace(plan)).is_correct
    drawn = np.asarray(draw_pictures(replace(item, images=item.images[:1]), 800))
    down, across = np.nonzero((drawn == panel._RIGHT).all(-1))
    place = {
        "squash": (100, 200, 300, 400), "pad": (100, 300, 300, 400), "tiles": (200, 200, 600, 400),
    }[kind]  # fmt: skip
    assert (across.min(), down.min(), across.max(), down.max()) == pytest.approx(
        place, abs=14 if kind == "tiles" else 8
    )


def test_a_box_that_the_first_view_does_not_show_is_not_drawn() -> None:
    plan = Halves(64, 4)
    layout = plan.of(ImageShape(128, 64))
    assert on_first_view((0.6, 0.1, 0.9, 0.5), plan, layout) is None
    assert on_first_view((0.25, 0.1, 0.9, 0.5), plan, layout) == pytest.approx((0.5, 0.1, 1.0, 0.5))
